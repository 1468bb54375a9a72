"use strict";

const assert = require("node:assert/strict");

const { load, unload } = require("./flow");
const world = require("./world");

const PNG = Buffer.from([0x89, 0x50, 0x4e, 0x47, 1, 2, 3]);
const at = (room) => `/rooms/${encodeURIComponent(room)}`;

describe("flowbridge room", () => {
    let facts, room;

    before(async () => {
        facts = await world.open();
        room = await world.room({ preset: "public_chat" });
    });
    afterEach(unload);

    const node = (operation, more) => ({ id: operation, type: "flowbridge room", operation, ...more });
    const state = (type, of = room) => world.matrix(facts.bot, "GET", `${at(of)}/state/${type}`);

    async function works(operation, msg, more = {}) {
        const { ask } = await load([node(operation, more)]);
        const { msg: sent, error } = await ask(msg);
        assert.equal(error, undefined);
        return sent;
    }

    it("creates a room with a name, and with all that createRoom takes", async () => {
        const named = await works("create", { payload: "Kitchen" });
        assert.equal(named.roomId, named.payload.room_id);
        assert.deepEqual(await state("m.room.name", named.roomId), { name: "Kitchen" });
        await unload();
        const alias = `made${Date.now()}`;
        const whole = await works("create", { payload: { room_alias_name: alias, topic: "Tea" } });
        assert.equal(whole.payload.room_alias, `#${alias}:localhost`);
        await unload();
        assert.match((await works("create", { payload: 1700000000000 })).roomId, /^!/);
    });

    it("invites, and the friend joins and leaves", async () => {
        const own = await world.room({ preset: "private_chat" });
        const { ask } = await load([node("invite", { room: own }), node("join"), node("leave")]);
        assert.equal((await ask({ payload: facts.friend.user_id })).error, undefined);
        const asFriend = { roomId: own, accessToken: facts.friend.access_token };
        assert.equal((await ask({ ...asFriend }, "join")).msg.payload.room_id, own);
        assert.equal((await ask({ ...asFriend }, "join")).error, undefined, "joining twice does nothing");
        assert.equal((await ask({ ...asFriend }, "leave")).error, undefined);
    });

    it("joins by an alias", async () => {
        const name = `join${Date.now()}`;
        const theirs = await world.matrix(facts.friend, "POST", "/createRoom", { preset: "public_chat", room_alias_name: name });
        const sent = await works("join", { topic: `#${name}:localhost` });
        assert.equal(sent.roomId, theirs.room_id);
    });

    for (const [operation, payload, type, content] of [
        ["name", "Operations", "m.room.name", { name: "Operations" }],
        ["name", { name: "" }, "m.room.name", { name: "" }],
        ["topic", "Who is on call", "m.room.topic", { topic: "Who is on call" }],
        ["avatar", "mxc://localhost/abc", "m.room.avatar", { url: "mxc://localhost/abc" }],
        ["pinned", "$one", "m.room.pinned_events", { pinned: ["$one"] }],
        ["pinned", ["$one", "$two"], "m.room.pinned_events", { pinned: ["$one", "$two"] }],
        ["pinned", [], "m.room.pinned_events", { pinned: [] }],
    ]) {
        it(`sets the ${operation} to ${JSON.stringify(payload)}`, async () => {
            const sent = await works(operation, { payload, roomId: room });
            assert.match(sent.eventId, /^\$/);
            assert.deepEqual(await state(type), content);
        });
    }

    it("uploads an avatar", async () => {
        await works("avatar", { payload: PNG, roomId: room });
        const { url } = await state("m.room.avatar");
        const headers = { Authorization: `Bearer ${facts.bot.access_token}` };
        const back = await fetch(`${facts.bridge}/media/${url.slice("mxc://".length)}`, { headers });
        assert.deepEqual(Buffer.from(await back.arrayBuffer()), PNG);
    });

    it("takes the value from where it is told", async () => {
        await works("topic", { where: { it: "is" }, roomId: room }, { value: "where.it", valueType: "msg" });
        assert.deepEqual(await state("m.room.topic"), { topic: "is" });
        await unload();
        await works("topic", { payload: "not this", roomId: room }, { value: "fixed", valueType: "str" });
        assert.deepEqual(await state("m.room.topic"), { topic: "fixed" });
    });

    it("lists the members", async () => {
        const sent = await works("members", {}, { room });
        assert.deepEqual(sent.payload, [{ user_id: facts.bot.user_id, displayname: "bot", avatar_url: null }]);
    });

    it("reads the history, page by page", async () => {
        const own = await world.room();
        for (const body of ["1", "2", "3"]) {
            await world.matrix(facts.bot, "PUT", `${at(own)}/send/m.room.message/${body}`, { msgtype: "m.text", body });
        }
        const { ask } = await load([node("history", { room: own, limit: 2 })]);
        const { msg } = await ask({});
        assert.deepEqual(msg.payload.map((event) => event.content.body), ["3", "2"]);
        const { msg: older } = await ask({ from: msg.next, limit: 1 });
        assert.deepEqual(older.payload.map((event) => event.content.body), ["1"]);
    });

    it("reads all state, and one", async () => {
        const { ask } = await load([node("state", { room })]);
        const { msg } = await ask({});
        assert.ok(msg.payload.some((event) => event.type === "m.room.create"));
        assert.equal((await ask({ payload: "m.room.join_rules" })).msg.payload.join_rule, "public");
        const member = { payload: "m.room.member", stateKey: facts.bot.user_id };
        assert.equal((await ask(member)).msg.payload.membership, "join");
    });

    it("says what is wrong", async () => {
        const { ask } = await load([node("invite"), node("name"), node("avatar"), node("pinned"), node("none"), node("join")]);
        for (const [id, msg, words] of [
            ["invite", { roomId: room }, /user to invite is missing/],
            ["invite", { payload: "nobody", roomId: room }, /./],
            ["invite", { payload: facts.friend.user_id }, /which room/],
            ["name", { payload: [], roomId: room }, /name is missing/],
            ["avatar", { payload: {}, roomId: room }, /avatar/],
            ["pinned", { payload: [1], roomId: room }, /event ids/],
            ["none", { roomId: room }, /choose/],
            ["join", { roomId: "#nowhere:localhost" }, /not found|alias/i],
        ]) {
            const { error } = await ask(msg, id);
            assert.match(error.message, words);
            assert.ok(Array.isArray(error.problems));
        }
    });
});

describe("room and account", () => {
    afterEach(unload);

    const NODES = [
        { id: "members", type: "flowbridge room", operation: "members", room: "!any:localhost" },
        { id: "whoami", type: "flowbridge account", operation: "whoami" },
    ];

    it("say that the key is wrong, or that the bridge is away", async () => {
        for (const [options, words] of [
            [{ key: "fb_wrong" }, /key|token/i],
            [{ server: { url: "http://127.0.0.1:1" } }, /connection refused/],
        ]) {
            const { ask, ends, node } = await load(NODES, options);
            for (const { id } of NODES) {
                assert.match((await ask({}, id)).error.message, words);
                assert.equal(node(id).status.lastCall.args[0].fill, "red");
            }
            assert.deepEqual([...ends.values()], [1, 1]);
            await unload();
        }
    });

    it("go on when the bridge comes back", async () => {
        const { ask } = await load(NODES);
        await world.bridge("kill");
        assert.match((await ask({}, "whoami")).error.message, /connection refused/);
        await world.bridge("start");
        assert.equal((await ask({}, "whoami")).error, undefined);
    });
});

describe("flowbridge account", () => {
    afterEach(unload);

    const node = (operation, more) => ({ id: operation, type: "flowbridge account", operation, ...more });

    it("registers, logs in, and says who one is", async () => {
        const { ask } = await load([node("register", { user: "payload", userType: "msg" }), node("login", { user: "payload", userType: "msg" }), node("whoami")]);
        const name = `nodered${Date.now()}`;
        const { msg: made, error } = await ask({ payload: name, password: "wordpass" });
        assert.equal(error, undefined);
        assert.equal(made.payload.user_id, `@${name}:localhost`);
        const { msg: loggedIn } = await ask({ payload: name, password: "wordpass" }, "login");
        assert.notEqual(loggedIn.payload.access_token, made.payload.access_token);
        const { msg: self } = await ask({ accessToken: loggedIn.payload.access_token }, "whoami");
        assert.equal(self.payload.user_id, `@${name}:localhost`);
        const { msg: bot } = await ask({}, "whoami");
        assert.equal(bot.payload.user_id, "@bot:localhost");
        assert.match((await ask({ payload: name, password: "wordpass" })).error.message, /taken|in use/i);
        assert.equal((await ask({ payload: name, password: "wrong" }, "login")).error.status, 403);
        assert.match((await ask({ payload: name }, "login")).error.message, /password is missing/);
        assert.match((await ask({ payload: {}, password: "x" }, "login")).error.message, /is not a string/);
    });
});
