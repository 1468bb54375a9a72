"use strict";
// What a flow author sees before anything runs: the palette, the help, the dialogs with what the bridge tells.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");

const browser = require("./editor");
const nodeRed = require("./node_red");
const world = require("./world");

const TYPES = ["send", "react", "listen", "room", "account"].map((name) => `flowbridge ${name}`);

describe("the editor", function () {
    this.timeout(300_000);
    let chromium;
    let red;
    let editor;
    let vault;

    before(async () => {
        red = await nodeRed.open();
        await red.deploy([]);
        await world.room({ name: "Kitchen <b>bold</b>", room_alias_name: `kitchen${Date.now()}` });
        const state = { type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } };
        vault = await world.room({ name: "Vault", initial_state: [state] });
        chromium = await browser.start();
        editor = await chromium.open(red.url);
        await editor.importFlow(fs.readFileSync(path.resolve(__dirname, "../examples/send.json"), "utf8"));
    });

    after(async () => {
        if (vault) await world.matrix(world.facts().bot, "POST", `/rooms/${encodeURIComponent(vault)}/leave`, {});
        await editor?.close();
        await chromium?.close();
    });

    it("gives a new server to the nodes of an example, and lists its rooms before anything is deployed", async () => {
        const { bridge, key } = world.facts();
        const servers = () =>
            editor.page.evaluate(() => RED.nodes.filterNodes({ type: "flowbridge send" }).map(({ server }) => Boolean(server)));
        assert.deepEqual(await servers(), [false, false]);
        await editor.makeServer("send and wait", { url: bridge, key });
        assert.deepEqual(await servers(), [true, true]);
        const dialog = await editor.openNode("send and wait");
        await editor.chooseType("#node-input-room", "room");
        assert.match(await editor.suggestions("#node-input-room", "kitch"), /Kitchen <b>bold<\/b>/);
        await dialog.cancel();
        await editor.deploy();
    });

    it("leaves a flow from before messages as it is", async () => {
        const kept = () => editor.page.evaluate(() => RED.nodes.filterNodes({ type: "flowbridge send" }).map((node) => node.as));
        assert.equal((await kept())[1], undefined, "which sends events: message_test.js");
        const dialog = await editor.openNode("queue");
        assert.equal(await editor.page.locator("#node-input-as").inputValue(), "content");
        await editor.page.locator(".flowbridge-of-an-event").waitFor();
        await editor.page.locator("details.flowbridge-of-a-message").waitFor({ state: "hidden" });
        await dialog.done();
        assert.equal((await kept())[1], "content");
    });

    for (const [word, types] of [["matrix", TYPES], ["chat", TYPES], ["notify", TYPES], ["emoji", ["flowbridge react"]], ["markdown", ["flowbridge send"]]]) {
        it(`is found in the palette by “${word}”`, async () => {
            const search = editor.page.locator("#red-ui-palette-search input");
            await search.pressSequentially(word); // it listens to keys
            const other = '.red-ui-palette-node[data-palette-type="inject"]';
            await editor.page.locator(`${other}[data-filter]`).waitFor({ state: "attached" });
            const found = await editor.palette("flowbridge");
            await search.press("Control+a");
            await search.press("Backspace");
            await editor.page.locator(`${other}:not([data-filter])`).waitFor({ state: "attached" });
            assert.deepEqual(found.sort(), [...types].sort());
        });
    }

    it("flags a room that is none", async () => {
        const valid = (room, as = "content") =>
            editor.page.evaluate(([value, how]) => {
                const node = RED.nodes.filterNodes({ type: "flowbridge send" })[0];
                const { room: before, roomType, as: asBefore } = node;
                Object.assign(node, { room: value, roomType: "room", as: how });
                const errors = RED.editor.validateNode(node) ? [] : node.validationErrors;
                Object.assign(node, { room: before, roomType, as: asBefore });
                RED.editor.validateNode(node);
                return errors.map(String);
            }, [room, as]);
        for (const good of ["", "!abc:example.org", "#ops:example.org", "${ROOM}"]) assert.deepEqual(await valid(good), []);
        assert.match((await valid("ops")).join(), /begins with '!', an alias with '#'/);
        assert.match((await valid("@al:example.org")).join(), /begins with '!'/);
        assert.deepEqual(await valid("@al:example.org", "text"), [], "a message may go to a user");
    });

    it("flags a server whose URL is none", async () => {
        const problems = await editor.page.evaluate(() => {
            const { url } = RED.nodes.getType("flowbridge-server").defaults;
            const look = (urlType, value) => url.validate.call({ urlType }, value, {});
            return [look("str", "localhost:8090"), look("str", "http://localhost:8090"), look("str", "${BRIDGE}"), look("env", "BRIDGE"), look("str", "")];
        });
        assert.match(problems[0], /is not a URL/);
        assert.deepEqual(problems.slice(1), [true, true, true, false]);
    });

    it("says why there is no list", async () => {
        const dialog = await editor.openNode("send and wait");
        await editor.page.evaluate(() => {
            const server = RED.nodes.node($("#node-input-server").val());
            window.urlBefore = server.url;
            server.url = "http://127.0.0.1:1";
        });
        await editor.chooseType("#node-input-room", "room");
        assert.match(await editor.suggestions("#node-input-room", "kitch"), /connection refused/);
        await editor.page.evaluate(() => (RED.nodes.node($("#node-input-server").val()).url = window.urlBefore));
        await dialog.cancel();
    });

    it("speaks German to those who do", async () => {
        const german = await chromium.open(red.url, "de");
        assert.match(await german.help("flowbridge send"), /Ausgaben[^]*Idempotenz/);
        const answer = await german.page.evaluate(
            (url) => new Promise((resolve) => window.flowbridge.ask("whoami", { url, urlType: "str", key: "fb_x" }, resolve)),
            world.facts().homeserver,
        );
        assert.match(answer, /ist ein Matrix-Homeserver, keine flowbridge: trage die Adresse der Bridge selbst ein/);
        assert.deepEqual(german.errors(), []);
        await german.close();
    });

    it("has the nodes in a category of their own", async () => {
        assert.deepEqual((await editor.palette("flowbridge")).sort(), [...TYPES].sort());
    });

    for (const type of TYPES) {
        it(`helps with ${type}`, async () => {
            assert.match(await editor.help(type), /Outputs[^]*Details/);
        });
    }

    it("lists the bridge's rooms and event types, as text whatever they are called", async () => {
        const dialog = await editor.openNode("send and wait");
        const { page } = editor;
        await editor.chooseType("#node-input-room", "room");
        assert.match(await editor.suggestions("#node-input-room", "kitch"), /Kitchen <b>bold<\/b>[^]*#kitchen\d+:localhost/);
        await page.keyboard.press("Escape");
        assert.match(await editor.suggestions("#node-input-eventType", "topic"), /m\.room\.topic/);
        await page.keyboard.press("Escape");
        await dialog.cancel();
    });

    it("marks encrypted rooms, and says what becomes of plain text there when one is chosen", async () => {
        const dialog = await editor.openNode("send and wait");
        const { page } = editor;
        await editor.chooseType("#node-input-room", "room");
        assert.doesNotMatch(await editor.suggestions("#node-input-room", "kitch"), /encrypted/);
        await page.keyboard.press("Escape");
        assert.match(await editor.suggestions("#node-input-room", "vau"), /Vault\s+encrypted\s+!/);
        assert.equal(await page.locator(".red-ui-autoComplete-container .fa-lock").count(), 1);
        await page.keyboard.press("Escape");
        const hint = page.locator(".flowbridge-encrypted");
        await hint.waitFor({ state: "hidden" });
        await editor.fill("#node-input-room", vault);
        await hint.getByText("This room is encrypted, and the bridge refuses plain text for it").waitFor();
        await editor.fill("#node-input-room", "!other:localhost");
        await hint.waitFor({ state: "hidden" });
        await dialog.cancel();
    });

    it("gives the send node a second output for what became of messages", async () => {
        const ports = () => editor.page.evaluate(() => RED.nodes.filterNodes({ type: "flowbridge send" }).map(({ name, outputs }) => [name, outputs]));
        assert.deepEqual(await ports(), [["send and wait", 1], ["queue", 2]]);
        for (const wanted of [2, 1]) {
            const dialog = await editor.openNode("send and wait");
            await editor.page.locator("#node-input-outcome").click();
            await dialog.done();
            assert.deepEqual((await ports())[0], ["send and wait", wanted]);
        }
    });

    it("shows what a message has beside its text for messages only, and folded away until it is in use", async () => {
        const { page } = editor;
        const section = page.locator("details.flowbridge-of-a-message");
        const isOpen = () => section.evaluate((element) => element.open);
        const choose = (as) => page.locator("#node-input-as").selectOption(as);
        const stored = () => editor.page.evaluate(() => {
            const { as, title, titleType, mentions, messageKey, onUpdate, onUpdateType, msgtype, msgtypeType, attachments, attachmentsType, objects } = RED.nodes.filterNodes({ type: "flowbridge send" })[0];
            return { as, title, titleType, mentions, messageKey, onUpdate, onUpdateType, msgtype, msgtypeType, attachments, attachmentsType, objects };
        });
        const standard = { as: "markdown", title: "", titleType: "str", mentions: "", messageKey: "", onUpdate: "edit", onUpdateType: "onUpdate" };
        const others = { msgtype: "m.text", msgtypeType: "msgtype", attachments: "attachments", attachmentsType: "msg", objects: "json" };

        let dialog = await editor.openNode("send and wait");
        await section.waitFor({ state: "hidden" });
        await choose("markdown");
        await section.waitFor();
        await page.locator(".flowbridge-of-an-event").waitFor({ state: "hidden" });
        assert.equal(await isOpen(), false);
        await dialog.done();
        assert.deepEqual(await stored(), { ...standard, ...others });

        dialog = await editor.openNode("send and wait");
        assert.equal(await isOpen(), false);
        await section.locator("summary").click();
        await editor.fill("#node-input-title", "Disk");
        await editor.fill("#node-input-mentions", "@al:example.org, @room");
        await page.locator(".flowbridge-of-a-key").waitFor({ state: "hidden" });
        await editor.fill("#node-input-messageKey", "disk-alarm");
        await page.locator(".flowbridge-of-a-key").waitFor();
        await editor.chooseOption("#node-input-msgtype", "notice (pings nobody)");
        await editor.chooseOption("#node-input-onUpdate", "post in its thread");
        await editor.screenshot(browser.picture("message"), { of: "dialog" });
        await dialog.done();
        const used = { title: "Disk", mentions: "@al:example.org, @room", messageKey: "disk-alarm", onUpdate: "thread", msgtype: "m.notice" };
        assert.deepEqual(await stored(), { ...standard, ...others, ...used });

        dialog = await editor.openNode("send and wait");
        assert.equal(await isOpen(), true);
        await editor.chooseOption("#node-input-msgtype", "message");
        await editor.chooseOption("#node-input-onUpdate", "edit the first message");
        for (const name of ["title", "mentions", "messageKey"]) await editor.fill(`#node-input-${name}`, "");
        await choose("content");
        await section.waitFor({ state: "hidden" });
        await dialog.done();
    });

    it("shows what a reaction needs, by what the node does", async () => {
        const { page } = editor;
        await editor.add("flowbridge react", "reacts");
        const dialog = await editor.openNode("reacts");
        for (const [operation, fields] of [["typing", ["seconds"]], ["read", ["target"]], ["redact", ["target", "reason"]], ["react", ["target", "emoji"]]]) {
            await page.locator("#node-input-operation").selectOption(operation);
            const shown = await page.locator("[class*=flowbridge-has-]:visible").evaluateAll((rows) => rows.map(({ className }) => /flowbridge-has-(\w+)/.exec(className)[1]));
            assert.deepEqual(shown, fields);
        }
        await dialog.done();
        const kept = await page.evaluate(() => {
            const [{ operation, target, targetType, emoji, server }] = RED.nodes.filterNodes({ type: "flowbridge react" });
            return { operation, target, targetType, emoji, server: Boolean(server) };
        });
        assert.deepEqual(kept, { operation: "react", target: "eventId", targetType: "msg", emoji: "👍", server: true });
    });

    it("makes a picture of a dialog", async () => {
        const dialog = await editor.openNode("send and wait");
        await editor.page.locator("#node-input-as").selectOption("text"); // as a new node has it
        await editor.screenshot(browser.picture("dialog"), { of: "dialog" });
        await dialog.cancel();
    });

    it("tests the server, with what stands in the dialog", async () => {
        const dialog = await editor.openNode("send and wait");
        const { page } = editor;
        await page.locator("#node-input-btn-server-edit").click();
        await page.locator("#flowbridge-test").click();
        const result = page.locator("#flowbridge-test-result");
        await result.getByText("You are @bot:localhost").waitFor();
        await page.locator("#node-config-input-key").fill("fb_wrong");
        await page.locator("#flowbridge-test").click();
        await result.getByText(/key|token/i).waitFor();
        const { bridge, homeserver } = world.facts();
        for (const [url, words] of [
            [bridge.replace("http://", ""), "is not a URL, which begins with http:// or https://: write http://"],
            [bridge.replace("http:", "https:"), "the bridge speaks http at this address, not https"],
            [homeserver, "is a Matrix homeserver, not a flowbridge"],
        ]) {
            await editor.fill("#node-config-input-url", url);
            await page.locator("#flowbridge-test").click();
            await result.getByText(words).waitFor();
        }
        const server = await editor.dialog();
        await server.cancel();
        await dialog.cancel();
    });

    it("leaves no error in its console", () => {
        assert.deepEqual(editor.errors(), []);
    });
});
