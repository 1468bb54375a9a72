"use strict";
// Every example, as a user meets it: imported in the editor of a real Node-RED, deployed, and its buttons pressed, with
// a real bridge and a real homeserver behind it.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const os = require("node:os");
const path = require("node:path");

const browser = require("./editor");
const nodeRed = require("./node_red");
const world = require("./world");

const EXAMPLES = path.resolve(__dirname, "../examples");

/**
 * What each example does: its buttons, in the order in which they are pressed, and what comes of each, in the room and
 * on the canvas. `stage` is `{room, messages(), editor, red}`: the room that the flow's variable ROOM names, and
 * the messages that are there since this example began.
 */
const DOES = {
    "http-request.json": [
        {
            inject: "Send a message",
            expects: async ({ messages, editor }) => {
                const event = await only(messages);
                assert.deepEqual(event.content, { msgtype: "m.text", body: "Hello from Node-RED" });
                await shows(editor, "Event id", { text: event.event_id.slice(0, 32) });
                assert.deepEqual(await editor.debugMessages("Event id"), [`"${event.event_id}"`]);
            },
        },
        {
            inject: "Send a wrong one",
            expects: async ({ messages, editor }) => {
                await shows(editor, "Problems", { text: "/info/w: must be" });
                const [problems] = await editor.debugMessages("Problems");
                assert.match(problems, /^"\/info\/w: [^↵]+↵\/url: [^↵]+"$/); // the sidebar shows a line's end so
                await only(messages); // that of before: nothing was sent
            },
        },
    ],
    "send.json": [
        {
            inject: "Send a text",
            expects: async ({ messages, editor }) => {
                const event = await only(messages);
                assert.deepEqual(event.content, { msgtype: "m.text", body: "The backup is done" });
                await shows(editor, "Event id", { text: event.event_id.slice(0, 32) });
                await shows(editor, "send and wait", { text: "sent", fill: "green" });
            },
        },
        { inject: "Send a notice", expects: ({ messages }) => arrives(messages, "All quiet") },
        {
            inject: "Send a wrong one",
            expects: async ({ editor }) => {
                await shows(editor, "Problems", { text: "m.room.message$m.image" });
                await shows(editor, "send and wait", { text: "m.room.message$m.image", fill: "red" });
                assert.match((await editor.debugMessages("Problems"))[0], /array\[2\]|\[ object, object \]/);
            },
        },
        {
            inject: "Queue a text",
            expects: async ({ messages, editor }) => {
                await arrives(messages, "Sooner or later");
                await shows(editor, "Outcome", { text: "sent" });
                await shows(editor, "queue", { text: "sent", fill: "green" }); // "accepted" lasts a second: outcome_test.js
            },
        },
    ],
    "markdown.json": [
        {
            inject: "The build failed",
            expects: async ({ messages, editor }) => {
                const event = await only(messages);
                const { body, formatted_body: html, "m.mentions": mentions } = event.content;
                const { user_id: who } = world.facts().friend;
                assert.match(body, /^Build 17\n@friend:localhost: the build of \*\*main\*\* failed/);
                assert.match(html, /<strong>Build 17<\/strong>.*matrix\.to\/#\/@friend:localhost.*<strong>main<\/strong>.*<table>/s);
                assert.deepEqual(mentions, { user_ids: [who] });
                await shows(editor, "react", { text: "done", fill: "green" });
                await shows(editor, "Event id", { text: event.event_id.slice(0, 32) });
            },
        },
    ],
    "alert-that-edits.json": [
        {
            inject: "Disk 91 %",
            expects: async ({ messages, editor }) => {
                const { content, event_id: id } = await only(messages);
                assert.equal(content.body, "Alert\nDisk 91 % full");
                await shows(editor, "Event id", { text: id.slice(0, 32) });
            },
        },
        {
            inject: "Disk 97 %",
            expects: async ({ messages }) => {
                const edit = await arrives(messages, "* Alert\nDisk 97 % full");
                const [first] = await messages();
                assert.deepEqual(edit.content["m.relates_to"], { rel_type: "m.replace", event_id: first.event_id });
            },
        },
        { inject: "All is well", expects: ({ messages }) => arrives(messages, "* Alert\nDisk 40 % full: all is well again") },
        {
            inject: "I am on it",
            expects: async ({ messages, editor, room }) => {
                await shows(editor, "react to it", { text: "done", fill: "green" });
                const [first] = await messages();
                const target = `/rooms/${encodeURIComponent(room)}/relations/${encodeURIComponent(first.event_id)}/m.annotation`;
                const { chunk } = await world.matrix(world.facts().bot, "GET", target, undefined, "v1");
                assert.deepEqual(chunk.map(({ content }) => content["m.relates_to"].key), ["👀"]);
            },
        },
    ],
    "listen.json": [
        {
            inject: "Say !ping",
            expects: async ({ messages, editor }) => {
                await shows(editor, "listen", { text: "connected", fill: "green" });
                await arrives(messages, "!ping");
                await arrives(messages, "pong");
            },
        },
    ],
    "room.json": [
        {
            inject: "Make a room",
            expects: async ({ editor }) => shows(editor, "Members", { text: world.facts().bot.user_id }),
        },
        { inject: "Read the history", expects: async ({ editor }) => shows(editor, "Events", { text: "m." }) },
    ],
    "account.json": [
        { inject: "Register", expects: async ({ editor }) => shows(editor, "User", { text: "@nodered-" }) },
        {
            inject: "Who is the server?",
            expects: async ({ editor }) => shows(editor, "Server's user", { text: world.facts().bot.user_id }),
        },
    ],
    "messaging.json": [
        {
            inject: "Let them talk",
            expects: async ({ editor }) => {
                await shows(editor, "Members", { text: "2" });
                await shows(editor, "History", { text: "Hello Bob. This is my first" });
                await shows(editor, "Live", { text: "@bob-" });
            },
        },
    ],
    "alert-with-image.json": [
        {
            inject: "Raise the alarm",
            expects: async ({ messages }) => {
                const event = await arrives(messages, "disk.png");
                assert.equal(event.content.msgtype, "m.image");
                assert.equal(event.content.info.mimetype, "image/png");
                const { bridge, bot } = world.facts();
                const thumbnail = `${bridge}/media/${event.content.url.slice("mxc://".length)}/thumbnail?width=32&height=32`;
                const small = await fetch(thumbnail, { headers: { Authorization: `Bearer ${bot.access_token}` } });
                assert.equal(small.status, 200, "the homeserver can read the picture");
                await arrives(messages, "Disk 93 % full");
            },
        },
    ],
};

describe("the examples", function () {
    this.timeout(600_000);
    let chromium;
    let red;
    let room;

    before(async () => {
        red = await nodeRed.open();
        room = red.room;
        chromium = await browser.start();
    });

    after(() => chromium?.close());

    it("are all in the table above", () => {
        assert.deepEqual(fs.readdirSync(EXAMPLES).sort(), Object.keys(DOES).sort());
    });

    for (const [file, buttons] of Object.entries(DOES)) {
        const name = path.parse(file).name;

        describe(file, () => {
            const stage = {};
            let logged;

            before(async () => {
                const before = (await world.messages(room)).length;
                const messages = async () => (await world.messages(room)).slice(before);
                logged = red.log().length;
                await red.deploy([]);
                Object.assign(stage, { red, room, messages, editor: await chromium.open(red.url) });
            });

            after(() => stage.editor?.close());

            afterEach(async function () {
                if (this.currentTest.state !== "failed") return;
                const picture = path.join(os.tmpdir(), `failed-${name}.png`);
                await stage.editor.page.screenshot({ path: picture });
                console.error(`${picture} shows the editor. Node-RED's log:\n${red.log().slice(logged)}`);
            });

            it("is imported and deployed", async () => {
                const { editor } = stage;
                const flow = JSON.parse(fs.readFileSync(path.join(EXAMPLES, file), "utf8"));
                await editor.importFlow(flow);
                const ours = flow.find(({ type }) => type.startsWith("flowbridge "));
                const { label, env } = flow.find(({ type }) => type === "tab");
                const { bridge, key } = world.facts();
                if (ours) await editor.makeServer(ours.id, { url: bridge, key });
                const values = { ROOM: room, WHO: world.facts().friend.user_id };
                for (const variable of (ours && env) || []) await editor.setVariable(label, variable.name, values[variable.name]);
                await editor.deploy();
            });

            for (const { inject, expects } of buttons) {
                it(`does what “${inject}” says`, async () => {
                    await stage.editor.pressInject(inject);
                    await expects(stage);
                });
            }

            it("makes a picture", async () => {
                await stage.editor.screenshot(browser.picture(name), { of: "workspace" });
            });

            it("leaves no error in the editor's console nor in Node-RED's log", () => {
                assert.deepEqual(stage.editor.errors(), []);
                assert.deepEqual(red.errors(logged), []);
            });
        });
    }
});

/** The message with this body, when it has arrived. */
async function arrives(messages, body) {
    return world.until(async () => (await messages()).find((event) => event.content.body === body));
}

/** The one message that is there, when it has arrived. */
async function only(messages) {
    const found = await world.until(async () => {
        const all = await messages();
        return all.length && all;
    });
    assert.equal(found.length, 1);
    return found[0];
}

/** Until a node shows this below itself: the text that it has to begin with, and the colour. */
async function shows(editor, name, { text, fill }) {
    await world.until(async () => {
        const status = await editor.status(name);
        return status?.text.startsWith(text) && (!fill || status.fill === fill);
    });
}
