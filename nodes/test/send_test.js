"use strict";

const assert = require("node:assert/strict");

const { helper, load, unload } = require("./flow");
const world = require("./world");

const SEND = { id: "n", type: "flowbridge send" };
const PNG = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");

describe("flowbridge send", function () {
    let facts, room;

    before(async () => {
        facts = await world.open();
        room = await world.room();
    });
    afterEach(unload);

    const bodies = async (of = room) => (await world.messages(of)).map((event) => event.content.body);

    it("sends a text and says which event it became", async () => {
        const { ask, node } = await load([{ ...SEND, room }]);
        const { msg, error } = await ask({ payload: "hello" });
        assert.equal(error, undefined);
        assert.match(msg.payload.event_id, /^\$/);
        assert.equal(msg.eventId, msg.payload.event_id);
        const found = (await world.messages(room)).find((event) => event.event_id === msg.eventId);
        assert.deepEqual(found.content, { msgtype: "m.text", body: "hello" });
        assert.equal(node("n").status.lastCall.args[0].fill, "green");
    });

    for (const [what, payload, body] of [
        ["a number", 1234567890, "1234567890"],
        ["a boolean", false, "false"],
        ["an object as the content", { msgtype: "m.notice", body: "content" }, "content"],
        ["a whole event", { type: "m.room.message", content: { msgtype: "m.text", body: "whole" } }, "whole"],
        ["what the bridge knows as a flow message", { payload: "inner" }, "inner"],
    ]) {
        it(`sends ${what}`, async () => {
            const { ask } = await load([{ ...SEND, room }]);
            const { msg, error } = await ask({ payload });
            assert.equal(error, undefined);
            const found = (await world.messages(room)).find((event) => event.event_id === msg.eventId);
            assert.equal(found.content.body, body);
        });
    }

    it("lets a whole event choose its type", async () => {
        const { ask } = await load([{ ...SEND, room }]);
        const { error } = await ask({ payload: { type: "m.room.topic", content: { topic: "from an event" } } });
        assert.equal(error, undefined);
        const state = await world.matrix(facts.bot, "GET", `/rooms/${encodeURIComponent(room)}/state/m.room.topic`);
        assert.equal(state.topic, "from an event");
    });

    describe("finds the room", () => {
        it("in msg.roomId before msg.topic", async () => {
            const { ask } = await load([SEND]);
            const { msg } = await ask({ payload: "by roomId", roomId: room, topic: "mqtt/topic" });
            assert.equal(msg.roomId, room);
        });

        it("in msg.topic", async () => {
            const { ask } = await load([SEND]);
            assert.equal((await ask({ payload: "by topic", topic: room })).error, undefined);
        });

        it("behind an alias", async () => {
            const alias = `alias${Date.now()}`;
            const other = await world.room({ room_alias_name: alias });
            const { ask } = await load([{ ...SEND, room: `#${alias}:localhost`, roomType: "room" }]);
            await ask({ payload: "by alias" });
            assert.deepEqual(await bodies(other), ["by alias"]);
        });

        it("in an environment variable, and in an expression", async () => {
            process.env.TEST_ROOM = room;
            const { ask } = await load([
                { ...SEND, room: "TEST_ROOM", roomType: "env" },
                { ...SEND, id: "j", room: "where.room", roomType: "jsonata" },
                { ...SEND, id: "s", room: "${TEST_ROOM}", roomType: "room" },
            ]);
            assert.equal((await ask({ payload: "env" })).error, undefined);
            assert.equal((await ask({ payload: "jsonata", where: { room } }, "j")).error, undefined);
            assert.equal((await ask({ payload: "in a string" }, "s")).error, undefined);
        });

        it("nowhere, and says so", async () => {
            const { ask } = await load([SEND]);
            for (const msg of [{ payload: "x" }, { payload: "x", topic: "mqtt/topic" }, { payload: "x", roomId: 5 }]) {
                const { error } = await ask(msg);
                assert.match(error.message, /room/);
                assert.equal(error.problems[0].pointer, "/roomId");
            }
        });
    });

    describe("says what is wrong", () => {
        it("with a payload, by its pointers, to Catch nodes, too", async () => {
            const { ask, node } = await load([{ ...SEND, room }]);
            const msg = { payload: { msgtype: "m.image", body: "x", info: { size: "big" } } };
            const { error } = await ask(msg);
            assert.deepEqual(error.problems.map((problem) => problem.pointer).sort(), ["/info/size", "/url"]);
            assert.match(error.message, /info\/size|url/);
            assert.equal(error.errcode, "M_BAD_JSON");
            assert.equal(msg.problems, error.problems);
            assert.equal(msg.statusCode, 400);
            assert.equal(node("n").status.lastCall.args[0].fill, "red");
        });

        it("with a key", async () => {
            const { ask } = await load([{ ...SEND, room }], { key: "fb_wrong" });
            const { error } = await ask({ payload: "x" });
            assert.equal(error.status, 401);
        });

        it("with a room of others", async () => {
            const theirs = (await world.matrix(facts.friend, "POST", "/createRoom", {})).room_id;
            const { ask } = await load([{ ...SEND, room: theirs }]);
            assert.equal((await ask({ payload: "x" })).error.status, 403);
        });

        it("with the address of the bridge", async () => {
            for (const [url, words] of [
                ["http://127.0.0.1:1", /connection refused/],
                ["not a url", /is not a URL/],
                ["ftp://x", /not http/],
                [facts.homeserver, /not a flowbridge|Unrecognized/],
                ["", /is not set/],
            ]) {
                const { ask } = await load([{ ...SEND, room }], { server: { url } });
                assert.match((await ask({ payload: "x" })).error.message, words);
                await unload();
            }
        });

        it("without a server", async () => {
            const { ask } = await load([{ ...SEND, room, server: "" }]);
            assert.match((await ask({ payload: "x" })).error.message, /no flowbridge server/);
        });
    });

    describe("sends a Buffer as a file", () => {
        for (const [what, msg, msgtype, mimetype, body, size = {}] of [
            ["an image by its bytes", { payload: PNG }, "m.image", "image/png", "file.png", { w: 1, h: 1 }],
            ["an image by its name", { payload: Buffer.from("x"), filename: "/tmp/cat.jpg" }, "m.image", "image/jpeg", "cat.jpg"],
            ["a sound by its type", { payload: Buffer.from("x"), contentType: "audio/ogg; codecs=opus" }, "m.audio", "audio/ogg", "file.ogg"],
            ["a video by its header", { payload: Buffer.from("x"), headers: { "content-type": "video/mp4" } }, "m.video", "video/mp4", "file.mp4"],
            ["anything else", { payload: Buffer.from([1, 2, 3]) }, "m.file", "application/octet-stream", "file.bin"],
            ["bytes that are no Buffer", { payload: new Uint8Array([1, 2]) }, "m.file", "application/octet-stream", "file.bin"],
        ]) {
            it(what, async () => {
                const { ask } = await load([{ ...SEND, room }]);
                const data = Buffer.from(msg.payload);
                const { msg: sent, error } = await ask(msg);
                assert.equal(error, undefined);
                const { content } = (await world.messages(room)).find((event) => event.event_id === sent.eventId);
                assert.equal(content.msgtype, msgtype);
                assert.deepEqual([content.body, content.info], [body, { mimetype, size: data.length, ...size }]);
                const headers = { Authorization: `Bearer ${facts.bot.access_token}` };
                const back = await fetch(`${facts.bridge}/media/${content.url.slice("mxc://".length)}`, { headers });
                assert.deepEqual(Buffer.from(await back.arrayBuffer()), data);
            });
        }

        it("but not an empty one, and not as state", async () => {
            const { ask } = await load([{ ...SEND, room }, { ...SEND, id: "t", room, eventType: "m.room.topic" }]);
            assert.match((await ask({ payload: Buffer.alloc(0) })).error.message, /empty/);
            assert.match((await ask({ payload: PNG }, "t")).error.message, /Buffer/);
        });
    });

    it("sends as the account of msg.accessToken", async () => {
        const theirs = (await world.matrix(facts.friend, "POST", "/createRoom", { invite: [facts.bot.user_id] })).room_id;
        const { ask } = await load([{ ...SEND, room: theirs }]);
        assert.equal((await ask({ payload: "x", accessToken: facts.friend.access_token })).error, undefined);
        assert.equal((await ask({ payload: "x", accessToken: {} })).error.problems[0].pointer, "/accessToken");
    });

    it("sends the same idempotency key once", async () => {
        const { ask } = await load([{ ...SEND, room, key: "_key", keyType: "msg" }]);
        const key = `once-${Date.now()}`;
        const [first, second] = [await ask({ payload: "once", _key: key }), await ask({ payload: "once", _key: key })];
        assert.equal(first.msg.eventId, second.msg.eventId);
        assert.equal((await ask({ payload: "other", _key: key })).error.status, 422);
        assert.equal((await ask({ payload: "x", _key: "é" })).error.problems[0].pointer, "/key");
    });

    it("takes a copy: what a flow does to its objects later is not sent", async () => {
        const { ask } = await load([{ ...SEND, room }]);
        const payload = { msgtype: "m.text", body: "as it was" };
        const asked = ask({ payload });
        await new Promise(setImmediate);
        payload.body = "changed";
        const { msg } = await asked;
        assert.equal((await world.messages(room)).find((event) => event.event_id === msg.eventId).content.body, "as it was");
    });

    describe("queues", () => {
        const QUEUE = { ...SEND, mode: "queue", patience: 1 };

        it("and goes on when the bridge has accepted it", async () => {
            const { ask, node } = await load([{ ...QUEUE, room }]);
            const { msg, error } = await ask({ payload: "accepted" });
            assert.equal(error, undefined);
            assert.match(msg.payload.delivery_id, /./);
            assert.equal(msg.deliveryId, msg.payload.delivery_id);
            assert.equal(node("n").status.lastCall.args[0].fill, "yellow");
            await world.until(async () => (await bodies()).includes("accepted"));
        });

        it("what it is given while the bridge is away, in order, and says so", async () => {
            const own = await world.room();
            const { ask, node } = await load([{ ...QUEUE, room: own }]);
            await world.bridge("kill");
            const asked = [1, 2, 3, 4, 5].map((number) => ask({ payload: `n${number}` }));
            await world.until(() => /connection refused/.test(node("n").outbox.trouble) && node("n").outbox.waiting === 5);
            assert.equal(node("n").status.lastCall.args[0].fill, "yellow");
            await world.bridge("start");
            for (const { error } of await Promise.all(asked)) assert.equal(error, undefined);
            await world.until(async () => (await bodies(own)).length === 5);
            assert.deepEqual(await bodies(own), ["n1", "n2", "n3", "n4", "n5"]);
        });

        it("not what is refused", async () => {
            const { ask } = await load([{ ...QUEUE, room }]);
            assert.equal((await ask({ payload: { msgtype: "m.image" } })).error.status, 400);
        });
    });

    it("ends each message once when it is deployed anew in the middle", async () => {
        const own = await world.room();
        const { ask, ends } = await load([{ ...SEND, room: own, mode: "queue" }]);
        const asked = Array.from({ length: 50 }, (_, number) => ask({ payload: `d${number}` }));
        await world.until(() => ends.size > 3);
        await helper.clearFlows();
        const results = await Promise.all(asked);
        assert.deepEqual([...ends.values()], Array(50).fill(1));
        for (const { error } of results) assert.equal(error, undefined, "what can be sent at once is sent");
        await world.until(async () => (await bodies(own)).length >= 50);
        assert.deepEqual(await bodies(own), Array.from({ length: 50 }, (_, number) => `d${number}`));
    });

    it("ends what waits for a bridge that is away when it is deployed anew", async () => {
        const { ask, ends, node } = await load([{ ...SEND, room, mode: "queue" }], {
            server: { url: "http://127.0.0.1:1" },
        });
        const asked = [1, 2, 3].map((number) => ask({ payload: `x${number}` }));
        await world.until(() => /connection refused/.test(node("n").outbox.trouble) && node("n").outbox.waiting === 3);
        await helper.clearFlows();
        for (const { error } of await Promise.all(asked)) assert.match(error.message, /connection refused|stopped/);
        assert.deepEqual([...ends.values()], [1, 1, 1]);
    });
});
