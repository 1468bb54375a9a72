"use strict";
// What a flow hears of a message that was accepted, once it is in its room, or dead.

const assert = require("node:assert/strict");

const { helper, load, shown, unload } = require("./flow");
const world = require("./world");

const CATCH = require("@node-red/nodes/core/common/25-catch.js");
const ENCRYPTED = { initial_state: [{ type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } }] };
const SEND = { id: "n", type: "flowbridge send", mode: "queue", patience: 1 };
const OUTCOMES = { ...SEND, outcome: true, outputs: 2, wires: [[], ["out"]] };

const bridge = () => helper.getNode("bridge");

describe("a message that was accepted", () => {
    let facts, plain, encrypted;

    before(async () => {
        facts = await world.open();
        plain = await world.room();
        encrypted = await world.room(ENCRYPTED);
    });
    afterEach(unload);

    const catching = (node) => load([{ ...node, wires: [[]] }, { id: "catch", type: "catch", scope: ["n"] }], { more: [CATCH] });

    it("and dies, reaches Catch as it came, with the reason", async () => {
        const { ask, ends, received, node } = await catching({ ...SEND, room: encrypted });
        const { _complete: complete } = node("n");
        let dones = 0;
        node("n")._complete = function (...args) {
            dones += 1;
            return complete.apply(this, args);
        };
        const { error } = await ask({ payload: "secret", topic: "mine", more: { kept: true } });
        assert.equal(error, undefined, "it was accepted");
        const { deliveryId } = await world.until(() => received[0]);
        const [msg] = received;
        assert.deepEqual([msg.payload, msg.topic, msg.more], ["secret", "mine", { kept: true }]);
        assert.ok(ends.has(msg._msgid), "under its own id");
        assert.match(msg.error.message, /the room is encrypted/);
        assert.deepEqual([msg.errcode, msg.statusCode, msg.problems], ["M_FORBIDDEN", 403, []]);
        assert.match(deliveryId, /./);
        assert.equal(msg.error.source.id, "n");
        assert.equal(dones, 1);
        assert.equal(shown(node("n")).fill, "red");
        assert.match(shown(node("n")).text, /the room is encrypted/);
    });

    it("and dies, is caught with its file", async () => {
        const { ask, received } = await catching({ ...SEND, room: encrypted });
        await ask({ payload: Buffer.from("bytes"), filename: "a.txt" });
        await world.until(() => received.length);
        assert.deepEqual(received[0].payload, Buffer.from("bytes"));
    });

    it("is told of at the second output, in its room or dead", async () => {
        const { ask, received, ends, node } = await load([OUTCOMES]);
        await ask({ payload: "good", roomId: plain });
        await ask({ payload: "bad", roomId: encrypted });
        await world.until(() => received.length === 2);
        const [sent, dead] = ["sent", "dead"].map((status) => received.find((msg) => msg.payload.status === status));
        assert.equal(sent.payload.delivery_id, sent.deliveryId);
        assert.deepEqual([sent.roomId, sent.eventId], [plain, sent.payload.event_id]);
        assert.ok((await world.messages(plain)).some((event) => event.event_id === sent.eventId && event.content.body === "good"));
        assert.deepEqual([dead.roomId, dead.eventId], [encrypted, undefined]);
        assert.equal(dead.payload.error.errcode, "M_FORBIDDEN");
        assert.deepEqual([...ends.keys()].sort(), [sent._msgid, dead._msgid].sort());
        assert.deepEqual([...ends.values()], [1, 1]);
        assert.ok(node("n").status.getCalls().some(({ args: [{ text }] }) => /underway/.test(text)), "meanwhile it says how many are on the way");
    });

    it("ends in green when all are in their rooms", async () => {
        const { ask, node } = await load([{ ...SEND, room: plain }]);
        for (const payload of ["1", "2", "3"]) await ask({ payload });
        await world.until(() => shown(node("n")).fill === "green");
        assert.match(shown(node("n")).text, /sent/);
    });

    it("is told of after the bridge was killed in between", async () => {
        const { ask, received } = await load([{ ...OUTCOMES, room: plain }]);
        const { error } = await ask({ payload: "through a crash" });
        await world.bridge("kill");
        assert.equal(error, undefined);
        await world.until(() => bridge().deliveries.pause > 0); // it has asked in vain
        assert.deepEqual(received, []);
        await world.bridge("start");
        await world.until(() => received.length);
        assert.equal(received[0].payload.status, "sent");
    });

    it("is told of by the node that a deploy has made", async () => {
        const { ask, received, redeploy, node } = await load([{ ...OUTCOMES, room: plain }]);
        await ask({ payload: "before the deploy" });
        const before = node("n");
        await redeploy();
        assert.notEqual(node("n"), before);
        await world.until(() => received.length);
        assert.equal(received[0].payload.status, "sent");
        assert.equal(bridge().deliveries.watched.size, 0);
    });

    it("of another account is asked about as that account", async () => {
        const theirs = (await world.matrix(facts.friend, "POST", "/createRoom", ENCRYPTED)).room_id;
        const { ask, received } = await catching({ ...SEND, room: theirs });
        await ask({ payload: "x", accessToken: facts.friend.access_token });
        await world.until(() => received.length);
        assert.match(received[0].error.message, /the room is encrypted/);
    });

    it("by the hundred is told of, each once, in a few questions", async () => {
        const rooms = [plain, await world.room(), await world.room(), await world.room()]; // each has its own order
        const { ask, received, ends } = await load([OUTCOMES]);
        const client = bridge().client;
        const call = client.call.bind(client);
        let questions = 0;
        client.call = (method, path, ...more) => {
            if (path === "/deliveries") questions += 1;
            return call(method, path, ...more);
        };
        const messages = 200;
        const began = Date.now();
        await Promise.all(Array.from({ length: messages }, (_, number) => ask({ payload: `m${number}`, roomId: rooms[number % 4] })));
        await world.until(() => received.length === messages);
        assert.deepEqual(new Set(received.map((msg) => msg._msgid)), new Set(ends.keys()));
        assert.deepEqual(new Set(received.map((msg) => msg.payload.status)), new Set(["sent"]));
        const seconds = (Date.now() - began) / 1000;
        assert.ok(questions <= seconds + messages / 100 + 1, `${questions} questions in ${seconds} s`);
    });
});
