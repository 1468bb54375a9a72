"use strict";
// What a payload becomes in the modes that are for people: texts, Markdown, HTML.

const assert = require("node:assert/strict");
const http = require("node:http");

const CATCH = require("@node-red/nodes/core/common/25-catch.js");
const { load, shown, unload } = require("./flow");
const { read } = require("../lib/message");
const world = require("./world");

const SEND = { id: "n", type: "flowbridge send", as: "text" };
const PNG = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");
const OGG = Buffer.from("OggS and more");

describe("a payload as a message", () => {
    const messageOf = (payload, { format = "text", ...more } = {}) => read(payload, { format, ...more })?.message;

    for (const [what, payload, more, message] of [
        ["a text", "hi", {}, { text: "hi" }],
        ["a number", 5, { format: "markdown" }, { markdown: "5" }],
        ["a boolean", false, { format: "html" }, { html: "false" }],
        ["a big number", 12345678901234567890n, {}, { text: "12345678901234567890" }],
        ["a message", { markdown: "*hi*", title: "T" }, {}, { markdown: "*hi*", title: "T" }],
        ["a message, whose keys count more than the node's", { text: "a", title: "T" }, { options: { title: "N", key: "k" } }, { text: "a", title: "T", key: "k" }],
        ["options that are empty", "a", { options: { title: "", mentions: [], thread: null, on_update: "thread" } }, { text: "a" }],
        ["a list", ["a"], {}, { markdown: '```json\n[\n  "a"\n]\n```', overflow: "file" }],
        ["any other object", { level: 5, text: "low" }, {}, { markdown: '```json\n{\n  "level": 5,\n  "text": "low"\n}\n```', overflow: "file" }],
        ["an object with a type that is no event's", { type: "alarm", content: { a: 1 } }, {}, { markdown: '```json\n{\n  "type": "alarm",\n  "content": {\n    "a": 1\n  }\n}\n```', overflow: "file" }],
        ["only addresses", undefined, { options: { attachments: "https://example.org/a.png" } }, { attachments: [{ url: "https://example.org/a.png" }] }],
        ["data: URLs", "a", { options: { attachments: ["data:text/plain,a", { data: "data:,b", filename: "b.txt" }] } }, { text: "a", attachments: [{ data: "data:text/plain,a" }, { data: "data:,b", filename: "b.txt" }] }],
        ["a text and files", "a", { options: { attachments: ["mxc://a/b", { url: "https://x/", caption: "x", filename: null }] } }, { text: "a", attachments: [{ content_uri: "mxc://a/b" }, { url: "https://x/", caption: "x" }] }],
    ]) {
        it(`is made of ${what}`, () => assert.deepEqual(messageOf(payload, more), message));
    }

    for (const content of [{ msgtype: "m.text", body: "x" }, { msgtype: "m.image" }, { type: "m.room.topic", content: { topic: "x" } }, { type: "com.example.alarm", content: {} }]) {
        it(`is not made of what is Matrix' already: ${JSON.stringify(content)}`, () => {
            assert.equal(messageOf(content), undefined);
            assert.throws(() => messageOf(content, { options: { title: "T" } }), /^InputError: title is for a text: the payload is an event's content/);
        });
    }

    it("holds its files apart, named by what is known of them", () => {
        const attachments = [{ data: OGG.toString("base64"), caption: "listen" }, "https://x/y", { data: { type: "Buffer", data: [1, 2] }, filename: "a.csv" }];
        const { message, files } = read(PNG, { format: "text", options: { attachments }, msg: { filename: "/tmp/dot.png", caption: "a dot" } });
        assert.deepEqual(message, {
            attachments: [
                { filename: "dot.png", mimetype: "image/png", caption: "a dot" },
                { filename: "file.ogg", mimetype: "audio/ogg", caption: "listen" },
                { url: "https://x/y" },
                { filename: "a.csv", mimetype: "text/csv" },
            ],
        });
        assert.deepEqual(files.map(({ at, data }) => [at, data]), [[0, PNG], [1, OGG], [3, Buffer.from([1, 2])]]);
        assert.equal(files[0].data, PNG, "and is not copied");
    });

    it("takes the files of an email as Node-RED's node gives them", () => {
        const email = { type: "attachment", content: PNG, contentType: "image/png", contentDisposition: "attachment", filename: "dot.png", cid: undefined, size: PNG.length };
        const { message, files } = read("Hello", { format: "text", options: { attachments: [email] } });
        assert.deepEqual(message, { text: "Hello", attachments: [{ filename: "dot.png", mimetype: "image/png" }] });
        assert.equal(files[0].data, PNG);
    });

    const cyclic = {};
    cyclic.self = cyclic;
    for (const [what, payload, options, sentence, pointer] of [
        ["nothing", undefined, {}, "there is nothing to send: the payload is empty", ""],
        ["nothing, null", null, { title: "T" }, "there is nothing to send: the payload is empty", ""],
        ["a circle", cyclic, {}, /^the payload cannot be written as JSON: Converting circular structure/, ""],
        ["a function", () => {}, {}, "the payload cannot be written as JSON: its type is function", ""],
        ["a file that is a number", "a", { attachments: ["https://x/", 5] }, "attachment 2 is not a file: give a Buffer, an address (https://…, mxc://… or data:…), or an object with data, url or content_uri", "/attachments/1"],
        ["a file that is a path", "a", { attachments: "/etc/passwd" }, /^attachment 1 is not a file: give a Buffer/, "/attachments/0"],
        ["data that is not base64", "a", { attachments: { data: "ü" } }, "the data of attachment 1 is neither a Buffer nor base64 nor a data: URL", "/attachments/0/data"],
        ["data that is base64url", "a", { attachments: { data: "_-8=" } }, /neither a Buffer nor base64/, "/attachments/0/data"],
        ["data that is almost base64, and long", "a", { attachments: { data: `${" ".repeat(1e6)}${"=".repeat(1e6)}!` } }, /neither a Buffer nor base64/, "/attachments/0/data"],
        ["a file that is two", "a", { attachments: { data: PNG, url: "https://x/" } }, "attachment 1 has data and url: it is one file", "/attachments/0/url"],
    ]) {
        it(`is refused: ${what}`, () => {
            assert.throws(() => messageOf(payload, { options }), (error) => {
                if (sentence instanceof RegExp) assert.match(error.message, sentence);
                else assert.equal(error.message, sentence);
                assert.equal(error.problems[0].pointer, pointer);
                return true;
            });
        });
    }

    it("is refused for an object, if that is wanted", () => {
        assert.throws(() => messageOf({ level: 5 }, { refuses: true }), /the payload is an object, and neither a message .* nor an event's content: make a text of it, or let the node send objects as JSON/);
        assert.deepEqual(messageOf({ text: "a" }, { refuses: true }), { text: "a" });
    });
});

describe("flowbridge send, as people write", () => {
    let facts, room;

    before(async () => {
        facts = await world.open();
        room = await world.room();
    });
    afterEach(unload);

    /** What is in the room after the node got this message. */
    async function sends(config, msg) {
        const { ask } = await load([{ ...SEND, room, ...config }]);
        const { msg: sent, error } = await ask(msg);
        assert.equal(error, undefined);
        const all = await world.messages(sent.roomId.startsWith("!") ? sent.roomId : room);
        return { sent, contents: (sent.events || [sent.eventId]).map((id) => all.find((event) => event.event_id === id)?.content) };
    }

    it("Markdown with a title, a mention and a notice, and says which events it became", async () => {
        const config = { as: "markdown", title: "Backup", mentions: "who", mentionsType: "msg", msgtype: "m.notice", msgtypeType: "msgtype" };
        const { sent, contents } = await sends(config, { payload: `**done**, ${facts.friend.user_id}`, who: [facts.friend.user_id] });
        const [content] = contents;
        assert.equal(content.msgtype, "m.notice");
        assert.match(content.formatted_body, /<strong>Backup<\/strong>.*<strong>done<\/strong>.*matrix\.to/s);
        assert.deepEqual(content["m.mentions"], { user_ids: [facts.friend.user_id] });
        assert.deepEqual(sent.events, [sent.eventId]);
        assert.equal(sent.payload.delivery_id, sent.deliveryId);
    });

    it("HTML, and a text that is none", async () => {
        assert.equal((await sends({ as: "html" }, { payload: "<b>x</b><script>y</script>" })).contents[0].formatted_body, "<b>x</b>");
        await unload();
        assert.deepEqual((await sends({}, { payload: "<b>x</b>" })).contents[0], { msgtype: "m.text", body: "<b>x</b>", "m.mentions": {} });
    });

    it("an object, in a way that people can read", async () => {
        const [content] = (await sends({}, { payload: { "<level>": 5 } })).contents;
        assert.match(content.formatted_body, /<pre><code class="language-json">\{\n {2}"&lt;level&gt;": 5\n\}/);
        assert.match(content.body, /"<level>": 5/);
        await unload();
        const { ask } = await load([{ ...SEND, room, objects: "refuse" }]);
        assert.match((await ask({ payload: { level: 5 } })).error.message, /let the node send objects as JSON/);
    });

    it("an object that is too long, with all of it as a file", async () => {
        const { contents } = await sends({}, { payload: { many: Array.from({ length: 9_000 }, (_, at) => `number ${at}`) } });
        assert.deepEqual(contents.map(({ msgtype }) => msgtype), ["m.text", "m.file"]);
    });

    it("an event's content as it is", async () => {
        const { contents, sent } = await sends({}, { payload: { msgtype: "m.emote", body: "waves" } });
        assert.deepEqual(contents, [{ msgtype: "m.emote", body: "waves" }]);
        assert.equal("events" in sent, false);
    });

    it("an answer, a thread, an edit", async () => {
        const { ask } = await load([{ ...SEND, room, replyTo: "replyTo", replyToType: "msg", thread: "thread", threadType: "msg", edit: "edit", editType: "msg" }]);
        const first = (await ask({ payload: "first" })).msg;
        const said = async (more) => {
            const { msg, error } = await ask({ payload: "next", ...more });
            assert.equal(error, undefined);
            return (await world.messages(room)).find((event) => event.event_id === msg.eventId).content;
        };
        assert.deepEqual((await said({ replyTo: first.eventId }))["m.relates_to"], { "m.in_reply_to": { event_id: first.eventId } });
        const { rel_type: relation, event_id: root } = (await said({ thread: first.deliveryId }))["m.relates_to"];
        assert.deepEqual([relation, root], ["m.thread", first.eventId]);
        assert.equal((await said({ edit: first.eventId }))["m.new_content"].body, "next");
        const { error } = await ask({ payload: "x", thread: "no target" });
        assert.deepEqual([error.status, error.problems[0].pointer], [400, "/thread"]);
    });

    it("one message for each key, edited, or what is wanted instead", async () => {
        const { ask } = await load([
            { ...SEND, room, messageKey: "topic", messageKeyType: "msg" },
            { ...SEND, id: "t", room, messageKey: "topic", messageKeyType: "msg", onUpdate: "thread", onUpdateType: "onUpdate" },
        ]);
        const topic = `disk ${Date.now()}`;
        const { msg: first } = await ask({ payload: "90 %", topic });
        const { msg: second } = await ask({ payload: "95 %", topic });
        const { msg: third } = await ask({ payload: "why?", topic }, "t");
        const all = await world.messages(room);
        const relation = (id) => all.find((event) => event.event_id === id).content["m.relates_to"];
        assert.equal(relation(first.eventId), undefined);
        assert.deepEqual(relation(second.eventId), { rel_type: "m.replace", event_id: first.eventId });
        assert.equal(relation(third.eventId).rel_type, "m.thread");
    });

    it("a text with its files, as one message with one key", async () => {
        const config = { attachments: "attachments", attachmentsType: "msg", key: "once", keyType: "msg" };
        const once = `files ${Date.now()}`;
        const url = `data:image/png;base64,${PNG.toString("base64")}`;
        const msg = () => ({ payload: "look", attachments: [{ data: PNG, caption: "a dot" }, OGG, { data: url, filename: "b.png" }], once });
        const { sent, contents } = await sends(config, msg());
        await unload();
        assert.deepEqual((await sends(config, msg())).sent.events, sent.events, "once, however often it is given");
        assert.deepEqual(contents.map(({ msgtype, body }) => [msgtype, body]), [["m.text", "look"], ["m.image", "a dot"], ["m.audio", "file.ogg"], ["m.image", "b.png"]]);
        assert.equal(sent.events.length, 4);
        const headers = { Authorization: `Bearer ${facts.bot.access_token}` };
        const back = await fetch(`${facts.bridge}/media/${contents[1].url.slice("mxc://".length)}`, { headers });
        assert.deepEqual(Buffer.from(await back.arrayBuffer()), PNG);
    });

    it("a large file, which is uploaded first, by its address", async () => {
        const large = Buffer.alloc(3 * 1024 * 1024, 7);
        PNG.copy(large);
        const { contents } = await sends({ attachments: "attachments", attachmentsType: "msg" }, { payload: "look", attachments: { data: large, caption: "large" } });
        const [, { msgtype, body, url, info }] = contents;
        assert.deepEqual([msgtype, body], ["m.image", "large"]);
        assert.deepEqual(info, { mimetype: "image/png", size: large.length, w: 1, h: 1 });
        const headers = { Authorization: `Bearer ${facts.bot.access_token}` };
        const back = await fetch(`${facts.bridge}/media/${url.slice("mxc://".length)}`, { headers });
        assert.ok(Buffer.from(await back.arrayBuffer()).equals(large));
    });

    it("a file from an address, which the bridge fetches, and not from a private one", async () => {
        const files = http.createServer((request, response) => {
            response.setHeader("content-type", "image/png");
            response.end(PNG);
        });
        await new Promise((resolve) => files.listen(0, "127.0.0.1", resolve));
        try {
            const config = { as: "markdown", attachments: "attachments", attachmentsType: "msg" };
            const url = `http://127.0.0.1:${files.address().port}/dot.png`;
            const { contents } = await sends(config, { payload: "*look*", attachments: [url, { url, filename: "again.png", caption: "again" }] });
            assert.deepEqual(contents.slice(1).map(({ msgtype, body, info }) => [msgtype, body, info.w]), [["m.image", "dot.png", 1], ["m.image", "again", 1]]);
            await unload();
            const { ask } = await load([{ ...SEND, room, ...config }]);
            const { error } = await ask({ payload: "x", attachments: "http://10.0.0.1/a.png" });
            assert.deepEqual([error.status, error.problems[0].pointer], [400, "/attachments/0/url"]);
        } finally {
            files.close();
            files.closeAllConnections();
        }
    });

    it("a Buffer as a file with a caption, and nothing for an empty one", async () => {
        const { contents } = await sends({}, { payload: PNG, filename: "dot.png", caption: "a dot" });
        const [{ msgtype, body, filename, info }] = contents;
        assert.deepEqual([msgtype, body, filename], ["m.image", "a dot", "dot.png"]);
        assert.deepEqual(info, { mimetype: "image/png", size: PNG.length, w: 1, h: 1 });
        await unload();
        const { ask } = await load([{ ...SEND, room }]);
        assert.match((await ask({ payload: Buffer.alloc(0) })).error.message, /empty/);
    });

    it("to a user, whose direct room it finds or makes", async () => {
        const { ask } = await load([SEND]);
        const { msg, error } = await ask({ payload: "psst", roomId: facts.friend.user_id });
        assert.equal(error, undefined);
        const direct = await world.matrix(facts.bot, "GET", `/user/${encodeURIComponent(facts.bot.user_id)}/account_data/m.direct`);
        const [theirs] = direct[facts.friend.user_id];
        assert.equal((await world.messages(theirs)).at(-1).event_id, msg.eventId);
        const refused = await ask({ payload: { msgtype: "m.text", body: "x" }, roomId: facts.friend.user_id });
        assert.match(refused.error.message, /not a room/);
        assert.match((await ask({ payload: "x", topic: "mqtt/topic" })).error.message, /a user whose direct room it is with '@'/);
    });

    it("to Catch nodes, what the bridge finds wrong", async () => {
        const { ask } = await load([{ ...SEND, room, mentions: "alice", title: "T" }]);
        const { error } = await ask({ payload: "x" });
        assert.deepEqual([error.status, error.problems.map(({ pointer }) => pointer)], [400, ["/mentions/0"]]);
        assert.match(error.message, /write it as @name:server/);
    });

    it("to Catch nodes, each event of it that dies later, and to the second output", async () => {
        const encrypted = await world.room({ initial_state: [{ type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } }] });
        const queued = { ...SEND, room: encrypted, mode: "queue", attachments: "attachments", attachmentsType: "msg", outcome: true, outputs: 2, wires: [[], ["out"]] };
        const { ask, received } = await load([queued, { id: "catch", type: "catch", scope: ["n"] }], { more: [CATCH] });
        assert.equal((await ask({ payload: "secret", attachments: [PNG] })).error, undefined, "it was accepted");
        await world.until(() => received.length === 4);
        const [caught, told] = [received.filter((msg) => msg.error), received.filter((msg) => !msg.error)];
        const [first, second] = caught.map((msg) => msg.deliveryId).sort();
        assert.equal(second, `${first}.1`);
        assert.deepEqual(caught.map(({ payload, errcode }) => [payload, errcode]), Array(2).fill(["secret", "M_FORBIDDEN"]));
        assert.deepEqual(told.map(({ payload }) => payload.status), ["dead", "dead"]);
        assert.deepEqual(caught[0].attachments, [PNG]);
    });

    it("in part, and warns: a homeserver refuses one event and takes the next", async () => {
        const failed = [{ delivery_id: "d.1", errcode: "M_TOO_LARGE", error: "event too large" }];
        const answer = JSON.stringify({ event_id: "$a", events: ["$a"], delivery_id: "d", flowbridge: { failed } });
        const fake = http.createServer((request, response) => response.end(answer)).listen(0, "127.0.0.1");
        await new Promise((resolve) => fake.once("listening", resolve));
        try {
            const { ask, node } = await load([{ ...SEND, room }], { server: { url: `http://127.0.0.1:${fake.address().port}` } });
            const { msg, error } = await ask({ payload: "x" });
            assert.equal(error, undefined);
            assert.deepEqual(msg.payload.flowbridge.failed, failed);
            assert.match(String(node("n").warn.lastCall.args[0]), /status\.partly|event too large/);
        } finally {
            await unload();
            fake.close();
            fake.closeAllConnections();
        }
    });

    it("queued while the bridge is away, once, with its files", async () => {
        const own = await world.room();
        const { ask, node } = await load([{ ...SEND, room: own, mode: "queue", patience: 1, attachments: "attachments", attachmentsType: "msg" }]);
        await world.bridge("kill");
        const payload = { markdown: "as it was" };
        const asked = [ask({ payload, attachments: [PNG] }), ask({ payload: "next" })];
        await world.until(() => /connection refused/.test(node("n").outbox.trouble) && node("n").outbox.waiting === 2);
        assert.equal(shown(node("n")).fill, "yellow");
        payload.markdown = "changed";
        await world.bridge("start");
        for (const { error } of await Promise.all(asked)) assert.equal(error, undefined);
        const found = await world.until(async () => {
            const all = await world.messages(own);
            return all.length >= 3 && all;
        });
        assert.deepEqual(found.map(({ content }) => content.body), ["as it was", "file.png", "next"]);
    });
});
