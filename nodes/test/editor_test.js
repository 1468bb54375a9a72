"use strict";
// What a flow author sees before anything runs: the palette, the help, the dialogs with what the bridge tells.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");

const browser = require("./editor");
const nodeRed = require("./node_red");
const world = require("./world");

const TYPES = ["send", "listen", "room", "account"].map((name) => `flowbridge ${name}`);

describe("the editor", function () {
    this.timeout(300_000);
    let chromium;
    let red;
    let editor;

    before(async () => {
        red = await nodeRed.open();
        await red.deploy([]);
        await world.room({ name: "Kitchen <b>bold</b>", room_alias_name: `kitchen${Date.now()}` });
        chromium = await browser.start();
        editor = await chromium.open(red.url);
        await editor.importFlow(fs.readFileSync(path.resolve(__dirname, "../examples/send.json"), "utf8"));
        await editor.deploy();
    });

    after(async () => {
        await editor?.close();
        await chromium?.close();
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
        const type = async (field, text) => {
            const input = page.locator(`#node-input-${field} + .red-ui-typedInput-container input[type=text]`).first();
            await input.fill("");
            await input.pressSequentially(text);
            return page.locator(".red-ui-autoComplete-container").innerText();
        };
        await page.locator("#node-input-room + .red-ui-typedInput-container .red-ui-typedInput-type-select").first().click();
        await page.locator(".red-ui-typedInput-options a", { hasText: /^room$/ }).first().click();
        assert.match(await type("room", "kitch"), /Kitchen <b>bold<\/b>[^]*#kitchen\d+:localhost/);
        await page.keyboard.press("Escape");
        assert.match(await type("eventType", "topic"), /m\.room\.topic/);
        await page.keyboard.press("Escape");
        await dialog.cancel();
    });

    it("makes a picture of a dialog", async () => {
        const dialog = await editor.openNode("send and wait");
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
        const server = await editor.dialog();
        await server.cancel();
        await dialog.cancel();
    });

    it("leaves no error in its console", () => {
        assert.deepEqual(editor.errors(), []);
    });
});
