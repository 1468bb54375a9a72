"use strict";
// Reactions, removals, read receipts and typing, as another account in the room sees them.

const assert = require("node:assert/strict");
const { execFile, spawn } = require("node:child_process");
const fs = require("node:fs/promises");
const http = require("node:http");
const os = require("node:os");
const path = require("node:path");
const { promisify } = require("node:util");

const CATCH = require("@node-red/nodes/core/common/25-catch.js");
const { load, shown, unload } = require("./flow");
const world = require("./world");

const at = (room) => `/rooms/${encodeURIComponent(room)}`;
const TARGET = { target: "eventId", targetType: "msg" };

describe("flowbridge react", () => {
    let facts, room;

    before(async () => {
        facts = await world.open();
        room = await world.room({ invite: [facts.friend.user_id] });
        await world.matrix(facts.friend, "POST", `${at(room)}/join`, {});
    });
    afterEach(unload);

    const node = (operation, more) => ({ id: operation, type: "flowbridge react", operation, room, ...TARGET, ...more });

    async function message(body = "hello") {
        const target = `${at(room)}/send/m.room.message/${Date.now()}-${Math.random()}`;
        return (await world.matrix(facts.friend, "PUT", target, { msgtype: "m.text", body })).event_id;
    }
    const event = (id) => world.matrix(facts.friend, "GET", `${at(room)}/event/${encodeURIComponent(id)}`);

    let limit = 1;
    /** What is ephemeral in the room for the friend: {type: content}. Synapse answers a sync that it knows from a cache. */
    async function ephemeral() {
        const filter = encodeURIComponent(JSON.stringify({ room: { rooms: [room], timeline: { limit: (limit += 1) } } }));
        const found = (await world.matrix(facts.friend, "GET", `/sync?filter=${filter}`)).rooms.join[room].ephemeral.events;
        return Object.fromEntries(found.map(({ type, content }) => [type, content]));
    }

    it("reacts, and lets the message go on as it came", async () => {
        const { ask, node: shownNode } = await load([node("react", { emoji: "✅" })]);
        const eventId = await message();
        const { msg, error } = await ask({ payload: "hello", eventId, roomId: "other" });
        assert.equal(error, undefined);
        assert.deepEqual([msg.payload, msg.eventId, msg.roomId], ["hello", eventId, "other"]);
        const { type, content } = await event(msg.reaction.event_id);
        assert.equal(type, "m.reaction");
        assert.deepEqual(content["m.relates_to"], { rel_type: "m.annotation", event_id: eventId, key: "✅" });
        assert.equal(shown(shownNode("react")).fill, "green");
    });

    it("reacts to what was sent with a key, and takes that away again", async () => {
        const key = `react ${Date.now()}`;
        const { ask } = await load([
            { id: "send", type: "flowbridge send", as: "text", room, messageKey: key },
            node("react", { target: `key:${key}`, targetType: "str", emoji: "mood", emojiType: "msg" }),
            node("redact", { target: "reaction.event_id", reason: "over" }),
        ]);
        const { msg: sent } = await ask({ payload: "up" }, "send");
        const { msg: reacted } = await ask({ mood: "🎉" }, "react");
        const { content } = await event(reacted.reaction.event_id);
        assert.equal(content["m.relates_to"].event_id, sent.eventId);
        const { msg: removed, error } = await ask({ reaction: reacted.reaction }, "redact");
        assert.equal(error, undefined);
        assert.match(removed.redaction.event_id, /^\$/);
        const { content: left, unsigned } = await event(reacted.reaction.event_id);
        assert.deepEqual([left, unsigned.redacted_because.content.reason], [{}, "over"]);
    });

    it("reacts in the direct room with a user, to a delivery", async () => {
        const { ask } = await load([{ id: "send", type: "flowbridge send", as: "text" }, node("react", { room: "", target: "deliveryId", emoji: "👋" })]);
        const { msg } = await ask({ payload: "psst", roomId: facts.friend.user_id }, "send");
        const { msg: reacted, error } = await ask({ ...msg }, "react");
        assert.equal(error, undefined);
        assert.match(reacted.reaction.event_id, /^\$/);
    });

    it("marks as read", async () => {
        const { ask } = await load([node("read")]);
        const eventId = await message();
        assert.equal((await ask({ eventId })).error, undefined);
        await world.until(async () => (await ephemeral())["m.receipt"]?.[eventId]?.["m.read"]?.[facts.bot.user_id]);
    });

    it("shows as typing, and ends that; also by an alias", async () => {
        const alias = `#typing${Date.now()}:localhost`;
        await world.matrix(facts.bot, "PUT", `/directory/room/${encodeURIComponent(alias)}`, { room_id: room });
        const { ask } = await load([node("typing", { room: alias, seconds: "on", secondsType: "msg" })]);
        const typists = async () => (await ephemeral())["m.typing"]?.user_ids || [];
        for (const [on, expected] of [[true, [facts.bot.user_id]], [0, []], ["60", [facts.bot.user_id]], [false, []]]) {
            assert.equal((await ask({ on })).error, undefined);
            await world.until(async () => (await typists()).join() === expected.join());
        }
    });

    for (const [what, operation, config, msg, pointer, sentence] of [
        ["no target", "react", {}, {}, "/target", /which message\? The target is an event id/],
        ["a target that is an object", "redact", {}, { eventId: {} }, "/target", /which message\?/],
        ["a receipt for a delivery", "read", {}, { eventId: "key:x" }, "/target", /a read receipt is for an event that is in its room: give its id/],
        ["an emoji that is an object", "react", { emoji: "mood", emojiType: "msg" }, { eventId: "$x", mood: {} }, "/key", /the reaction is a text/],
        ["to type for ever", "typing", { seconds: "on", secondsType: "msg" }, { on: 301 }, "/seconds", /a number of seconds, at most 300; 0 ends it/],
        ["to type for a while", "typing", { seconds: "on", secondsType: "msg" }, { on: "a while" }, "/seconds", /a number of seconds/],
        ["to type to a user", "typing", { room: "@a:b" }, {}, "/roomId", /not a room/],
    ]) {
        it(`says what is wrong with ${what}`, async () => {
            const { ask, node: shownNode } = await load([node(operation, config)]);
            const { error } = await ask(msg);
            assert.match(error.message, sentence);
            assert.equal(error.problems[0].pointer, pointer);
            assert.equal(shown(shownNode(operation)).fill, "red");
        });
    }

    it("says what the bridge finds wrong, and what is not chosen", async () => {
        const { ask } = await load([node("react", { emoji: "" }), node("nonsense")]);
        assert.match((await ask({ eventId: "$x" })).error.message, /what to react with/);
        assert.match((await ask({ eventId: "$x" }, "nonsense")).error.message, /choose what the node does/);
    });

    for (const [status, colour] of [["dead", "red"], ["sent", "green"]]) {
        it(`tells what became of a reaction that was accepted, by a bridge that is slow: ${status}`, async () => {
            const deliveries = [{ delivery_id: "d1", status, room_id: room, error: { status: 404, errcode: "M_NOT_FOUND", error: "its target was never sent" } }];
            const slow = http.createServer((request, response) => {
                const isPost = request.method === "POST";
                response.writeHead(isPost ? 202 : 200, { "content-type": "application/json" });
                response.end(JSON.stringify(isPost ? { delivery_id: "d1", status: "queued" } : { deliveries }));
            });
            await new Promise((resolve) => slow.listen(0, "127.0.0.1", resolve));
            try {
                const nodes = [{ ...node("react", { emoji: "👍" }), wires: [[]] }, { id: "catch", type: "catch", scope: ["react"] }];
                const { ask, received, node: found } = await load(nodes, { more: [CATCH], server: { url: `http://127.0.0.1:${slow.address().port}` } });
                const { error } = await ask({ payload: "hello", eventId: "d0" });
                assert.equal(error, undefined);
                assert.equal(shown(found("react")).fill, "yellow");
                await world.until(() => shown(found("react")).fill === colour);
                if (status === "sent") return assert.deepEqual(received, []);
                await world.until(() => received.length);
                const [{ payload, eventId, deliveryId, errcode, error: caught }] = received;
                assert.deepEqual([payload, eventId, deliveryId, errcode, caught.message], ["hello", "d0", "d1", "M_NOT_FOUND", "its target was never sent"]);
            } finally {
                await unload();
                slow.close();
                slow.closeAllConnections();
            }
        });
    }

    it("says which key typing needs, and reacts with one that is limited", async function () {
        const { url, key, stop } = await limited(facts, room);
        try {
            const { ask } = await load([node("typing", { seconds: "5", secondsType: "num" }), node("read"), node("react", { emoji: "👀" })], { server: { url }, key });
            const eventId = await message();
            for (const operation of ["typing", "read"]) {
                const { error } = await ask({ eventId }, operation);
                assert.match(error.message, /this API key is not for typing notices and read receipts.*admin.*access token/);
            }
            const asFriend = { eventId, accessToken: facts.friend.access_token };
            assert.equal((await ask(asFriend, "typing")).error, undefined, "a token needs no key");
            assert.equal((await ask({ eventId }, "react")).error, undefined);
        } finally {
            await stop();
        }
    });
});

/** Another bridge, with a key that is for this room only: those of the world's are without limits. */
async function limited({ homeserver, bot }, room) {
    const folder = await fs.mkdtemp(path.join(os.tmpdir(), "flowbridge-"));
    const command = path.join(world.ROOT, ".venv/bin/flowbridge");
    const { PATH } = process.env;
    const env = { PATH, HOME: folder, BASE_URL: homeserver, ACCESS_TOKEN: bot.access_token, FLOWBRIDGE_DATABASE_URL: `sqlite:///${folder}/flowbridge.db` };
    await promisify(execFile)(command, ["init"], { cwd: folder, env });
    const { stdout: key } = await promisify(execFile)(command, ["keys", "create", "--room", room], { cwd: folder, env });
    const port = 11_000 + Math.floor(Math.random() * 7_000);
    const child = spawn(command, ["serve", "--port", String(port)], { cwd: folder, env, stdio: "ignore" });
    const ended = new Promise((resolve) => child.once("exit", resolve));
    const url = `http://127.0.0.1:${port}`;
    const stop = async () => {
        child.kill();
        await ended;
        await fs.rm(folder, { recursive: true, force: true });
    };
    const answers = () => fetch(`${url}/healthz`).then(({ ok }) => ok, () => false);
    try {
        await world.until(async () => child.exitCode !== null || (await answers()));
        assert.equal(child.exitCode, null);
    } catch (error) {
        await stop();
        throw error;
    }
    return { url, key: key.trim(), stop };
}
