"use strict";
// Node-RED's editor in a headless Chromium, used as a person uses it: by its menus, dialogs and buttons.

const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");

const { chromium } = require("playwright-core");

const CHROMIUM = process.env.CHROMIUM || "/usr/bin/chromium";
const ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];
const VIEWPORT = { width: 1280, height: 800 };
const PATIENCE = 60_000;
const MARGIN = 20; // around a flow in its picture

/** Starts a browser with a new, empty profile; its `open(url)` resolves to an Editor. */
async function start() {
    const browser = await chromium.launch({ executablePath: CHROMIUM, args: ARGUMENTS, timeout: 2 * PATIENCE });
    return {
        open: (url, locale) => open(browser, url, locale),
        close: () => browser.close(),
    };
}

async function open(browser, url, locale = "en-US") {
    const context = await browser.newContext({ viewport: VIEWPORT, locale });
    context.setDefaultTimeout(PATIENCE);
    const editor = new Editor(await context.newPage(), url);
    await editor.load();
    return editor;
}

class Editor {
    constructor(page, url) {
        this.page = page;
        this.url = url;
        this.complaints = [];
        page.on("console", (message) => {
            if (message.type() === "error") this.complaints.push(`${message.text()} (${message.location().url})`);
        });
        page.on("pageerror", (error) => this.complaints.push(error.stack || String(error)));
    }

    /** What the page had to complain about so far: a test fails when there is anything. */
    errors() {
        return [...this.complaints];
    }

    async load() {
        // What the editor fetches from elsewhere would make a test depend on the internet: it fails, and so is seen.
        const here = new URL(this.url).host;
        await this.page.route((target) => target.host !== here, (route) => route.abort());
        await this.page.goto(this.url);
        await this.page.locator("#red-ui-loading-progress").waitFor({ state: "hidden" });
        await this.page.locator("#red-ui-header-button-deploy").waitFor();
    }

    async close() {
        await this.page.context().close();
    }

    /** Menu, Import, paste, "new flow", Import; leaves the new flow in view. `flow` is the text of a file, or nodes. */
    async importFlow(flow) {
        const text = typeof flow === "string" ? flow : JSON.stringify(flow);
        const { page } = this;
        await page.locator("#red-ui-header-button-sidemenu").click();
        await page.locator("#menu-item-import").click();
        const textarea = page.locator("#red-ui-clipboard-dialog-import-text");
        await textarea.fill(text);
        await textarea.press("End"); // the dialog looks at the text when a key is released
        const asNewFlow = page.locator("#red-ui-clipboard-dialog-import-opt-new");
        if (!(await hasClass(asNewFlow, "selected"))) await asNewFlow.click();
        await page.locator("#red-ui-clipboard-dialog-ok").click();
        await page.locator("#red-ui-clipboard-dialog").waitFor({ state: "hidden" });
        await this.#told("imported", /Imported:/);
        const nodes = JSON.parse(text);
        await this.#holds(nodes);
        for (const tab of nodes.filter(({ type }) => type === "tab")) await this.showFlow(tab.label);
    }

    /** Throws when the editor does not hold all of these: it drops one of two with the same id, without a word. */
    async #holds(nodes) {
        const lost = await this.page.evaluate((wanted) => {
            const held = new Map(RED.nodes.createCompleteNodeSet().map((node) => [node.id, node]));
            return wanted.filter(({ id, type }) => held.get(id)?.type !== type);
        }, nodes.map(({ id, type }) => ({ id, type })));
        if (lost.length) throw new Error(`not imported: ${JSON.stringify(lost)}`);
    }

    /** Clicks on a flow's tab. */
    async showFlow(label) {
        const tab = this.page.locator("#red-ui-workspace-tabs li.red-ui-tab").filter({ hasText: label });
        await tab.click();
        await this.page.waitForFunction((name) => RED.nodes.workspace(RED.workspaces.active())?.label === name, label);
    }

    /** Presses Deploy, and waits until all of it is deployed. */
    async deploy() {
        await this.page.locator("#red-ui-header-button-deploy:not(.disabled)").click();
        await this.#told("deployed", /Successfully deployed/);
    }

    /** Presses the button of an inject node. */
    async pressInject(name) {
        const node = await this.#node(name);
        await node.locator(".red-ui-flow-node-button-button").click();
        await this.#told("injected", /Successfully injected/);
    }

    /** Makes a flowbridge server in the dialog of a node, as a person does who has none yet. */
    async makeServer(of, { url, key }) {
        const node = await this.openNode(of);
        await node.element.locator("#node-input-btn-server-add, #node-input-lookup-server-add").first().click();
        await this.page.locator("#node-config-input-key").waitFor();
        const server = await this.dialog();
        await this.chooseType("#node-config-input-url", "string");
        await this.page.locator("#node-config-input-url + .red-ui-typedInput-container input[type=text]:visible").first().fill(url);
        await this.page.locator("#node-config-input-key").fill(key);
        await server.done();
        await node.done();
    }

    /** Double-clicks a flow's tab, and sets one of its environment variables. */
    async setVariable(label, name, value) {
        const tab = this.page.locator("#red-ui-workspace-tabs li.red-ui-tab").filter({ hasText: label });
        await tab.dblclick();
        const dialog = await this.dialog();
        await dialog.element.locator(".red-ui-tab-link-button, .red-ui-tab-link-buttons a").filter({ has: this.page.locator(".fa-list") }).first().click();
        const names = dialog.element.locator("input.node-input-env-name");
        await names.first().waitFor();
        for (const row of await names.all()) {
            if ((await row.inputValue()) !== name) continue;
            const box = row.locator("xpath=following-sibling::*[contains(@class, 'red-ui-typedInput-container')]");
            await box.locator("input[type=text]").first().fill(value);
            return dialog.done();
        }
        throw new Error(`${label} has no variable ${name}`);
    }

    /** Chooses a type of a TypedInput. */
    async chooseType(field, type) {
        await this.page.locator(`${field} + .red-ui-typedInput-container .red-ui-typedInput-type-select`).first().click();
        await this.page.locator(".red-ui-typedInput-options:visible a", { hasText: new RegExp(`^${type}$`) }).first().click();
    }

    /** Chooses a value of a TypedInput that has a menu of them. */
    async chooseOption(field, text) {
        await this.page.locator(`${field} + .red-ui-typedInput-container .red-ui-typedInput-option-trigger`).first().click();
        await this.page.locator(".red-ui-typedInput-options:visible a").getByText(text, { exact: true }).click();
    }

    /** Puts a new node of a type, with its standard values, into the flow in view. */
    async add(type, name) {
        await this.page.evaluate(([kind, label]) => {
            const [node] = RED.nodes.import([{ id: RED.nodes.id(), type: kind, z: RED.workspaces.active(), x: 300, y: 600, name: label, wires: [[]] }]).nodes;
            const { defaults } = node._def;
            for (const key of Object.keys(defaults)) if (!["name", "server"].includes(key)) node[key] = defaults[key].value;
            RED.view.redraw(true);
        }, [type, name]);
    }

    /** Types into a TypedInput; the text of its suggestions. */
    async suggestions(field, text) {
        const input = this.page.locator(`${field} + .red-ui-typedInput-container input[type=text]`).first();
        await input.fill("");
        await input.pressSequentially(text);
        return this.page.locator(".red-ui-autoComplete-container").innerText();
    }

    /** Types a value into a TypedInput as it is. */
    async fill(field, text) {
        const input = this.page.locator(`${field} + .red-ui-typedInput-container input[type=text]`).first();
        await input.fill(text);
        await input.press("Tab"); // it looks at the text when it is left
    }

    /** What a node shows below itself: `{text, fill, shape}`, or nothing. */
    async status(name) {
        const node = await this.#node(name);
        return node.evaluate((element) => {
            const group = element.querySelector(".red-ui-flow-node-status-group");
            if (!group || group.style.display === "none") return undefined;
            const text = group.querySelector(".red-ui-flow-node-status-label").textContent;
            const sign = group.querySelector("rect.red-ui-flow-node-status");
            const [, shape, fill] = /red-ui-flow-node-status-(dot|ring)-(\w+)/.exec(sign.getAttribute("class")) || [];
            if (sign.style.display !== "none") return { text, fill, shape };
            return text ? { text } : undefined;
        });
    }

    /** What a debug node wrote into the sidebar, the oldest first. */
    async debugMessages(name) {
        const node = await this.#node(name);
        const id = (await node.getAttribute("id")).replaceAll(".", "_");
        return this.page.locator(`.red-ui-debug-msg-node-${id} .red-ui-debug-msg-payload`).allTextContents();
    }

    /** Opens a node's edit dialog by a double click. Its `element` is the dialog; `cancel()` and `done()` close it. */
    async openNode(name) {
        const node = await this.#node(name);
        await node.locator("rect.red-ui-flow-node").dblclick({ position: { x: 50, y: 15 } });
        return this.dialog();
    }

    /**
     * The edit dialog on top: that of a node, or that of a configuration node which was opened from it: first wait for
     * something that only this one has, since both are there while it slides in.
     */
    async dialog() {
        const element = this.page.locator(".red-ui-tray").last();
        await element.locator("form").first().waitFor();
        const drawn = await element.elementHandle();
        await drawn.waitForElementState("stable"); // it slides in
        const shut = async (button) => {
            await element.locator(button).click();
            await drawn.waitForElementState("hidden"); // below it may be another
        };
        return {
            element,
            cancel: () => shut("#node-dialog-cancel, #node-config-dialog-cancel"),
            done: () => shut("#node-dialog-ok, #node-config-dialog-ok"),
        };
    }

    /** The types of the nodes in a category of the palette, from top to bottom. */
    async palette(category) {
        const title = this.page.locator(".red-ui-palette-header > span").getByText(category, { exact: true });
        const nodes = this.page
            .locator("#red-ui-palette-container .red-ui-palette-category")
            .filter({ has: title })
            .locator(".red-ui-palette-node:visible");
        await nodes.first().waitFor();
        return nodes.evaluateAll((found) => found.map((node) => node.dataset.paletteType));
    }

    /** The text that the Help sidebar shows about a type; it is opened from the palette's own card of that node. */
    async help(type) {
        const { page } = this;
        const node = page.locator(`#red-ui-palette-container .red-ui-palette-node[data-palette-type="${type}"]`);
        await node.hover();
        await page.locator(".red-ui-popover:visible .fa-book").click();
        const text = page.locator("div.red-ui-help > div.red-ui-help:visible");
        await text.waitFor();
        const found = await text.innerText();
        await page.mouse.move(0, 0); // the card goes when it is left
        await page.locator(".red-ui-popover").waitFor({ state: "hidden" });
        return found;
    }

    /** A picture of the flow in view, of the dialog on top, or of all of it. */
    async screenshot(file, { of = "page" } = {}) {
        await this.#dismissNotifications();
        const options = { path: file, animations: "disabled" };
        if (of === "page") await this.page.screenshot(options);
        else if (of === "dialog") await (await this.dialog()).element.screenshot(options);
        else if (of === "workspace") await this.#screenshotOfWorkspace(file);
        else throw new Error(`a screenshot of what? ${of}`);
    }

    /** As wide as the window, for which palette and sidebar make room, and as high as the flow. */
    async #screenshotOfWorkspace(file) {
        const toggle = (shown) =>
            this.page.evaluate((state) => {
                RED.actions.invoke("core:toggle-palette", state);
                RED.actions.invoke("core:toggle-sidebar", state);
            }, shown);
        await toggle(false);
        await this.page.waitForFunction(
            (width) => document.querySelector("#red-ui-workspace-chart").clientWidth > width * 0.9,
            VIEWPORT.width,
        );
        await this.page.evaluate(() => RED.view.select({ nodes: [] }));
        await this.page.mouse.move(0, 0);
        const nodes = await this.page.locator(".red-ui-flow-node-group, .red-ui-flow-group").all();
        const boxes = (await Promise.all(nodes.map((node) => node.boundingBox()))).filter(Boolean);
        const bottom = Math.max(...boxes.map(({ y, height }) => y + height)) + MARGIN;
        const chart = await this.page.locator("#red-ui-workspace-chart").boundingBox();
        const width = await this.page.locator("#red-ui-workspace-chart").evaluate(({ clientWidth }) => clientWidth);
        const clip = { x: chart.x, y: chart.y, width, height: Math.min(bottom - chart.y, chart.height) };
        await this.page.screenshot({ path: file, clip, animations: "disabled" });
        await toggle(true);
    }

    /** The node of this name, or id, in the flow in view, as it is drawn. */
    async #node(name) {
        const ids = await this.page.evaluate((wanted) => {
            const inView = RED.nodes.filterNodes({ z: RED.workspaces.active() });
            return inView.filter((node) => node.name === wanted || node.id === wanted).map(({ id }) => id);
        }, name);
        if (ids.length !== 1) throw new Error(`${ids.length} nodes of the flow in view are named “${name}”`);
        return this.page.locator(`g[id="${ids[0]}"]`);
    }

    /** Waits for a notification, and puts it away since it covers nodes. An error or a question is a failure. */
    async #told(what, expected) {
        const { page } = this;
        const notification = page.locator(".red-ui-notification:visible");
        const good = notification.filter({ hasText: expected });
        const bad = page.locator(".red-ui-notification-error:visible, .red-ui-notification:visible:has(button)");
        await good.or(bad).first().waitFor();
        if (!(await good.count()) || (await bad.count())) {
            throw new Error(`not ${what}: ${(await notification.allInnerTexts()).join("; ")}`);
        }
        await this.#dismissNotifications();
    }

    /** A click on a notification puts it away. */
    async #dismissNotifications() {
        const notifications = this.page.locator(".red-ui-notification:visible");
        await notifications.evaluateAll((found) => found.forEach((notification) => notification.click()));
        await this.page.waitForFunction(() => !$(".red-ui-notification:visible").length);
    }
}

async function hasClass(locator, name) {
    return locator.evaluate((element, wanted) => element.classList.contains(wanted), name);
}

/** Where a picture goes: those of the documentation change when somebody wants it, not with every run. */
function picture(name) {
    const wanted = process.env.FLOWBRIDGE_SCREENSHOTS === "1";
    const folder = wanted ? path.resolve(__dirname, "../pictures") : path.join(os.tmpdir(), "flowbridge-pictures");
    fs.mkdirSync(folder, { recursive: true });
    return path.join(folder, `${name}.png`);
}

module.exports = { start, picture, Editor };
