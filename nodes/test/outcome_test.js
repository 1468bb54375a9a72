"use strict";
// What a flow hears of a message that was accepted, once it is in its room, or dead.

const assert = require("node:assert/strict");
const http = require("node:http");

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

    describe("by a bridge that does as no real one does when it is wanted", () => {
        let server, answer;

        before(async () => {
            server = http.createServer((request, response) => {
                const id = request.method === "POST" ? "d1" : undefined;
                const [status, body] = id ? [202, { delivery_id: id, status: "queued" }] : answer();
                response.writeHead(status, { "content-type": "application/json", ...(id && { "flowbridge-delivery": id }) }).end(JSON.stringify(body));
            });
            await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
        });
        after(() => {
            server.closeAllConnections();
            server.close();
        });

        const WAITS = { ...OUTCOMES, room: "!any:localhost", mode: "wait" }; // it waited in vain
        const loaded = () => load([WAITS], { server: { url: `http://127.0.0.1:${server.address().port}` } });

        it("is told of when the node had waited", async () => {
            answer = () => [200, { deliveries: [{ delivery_id: "d1", status: "dead", room_id: "!any:localhost", error: { status: 413, errcode: "M_TOO_LARGE", error: "it is too large" } }] }];
            const { ask, received, node } = await loaded();
            const { error } = await ask({ payload: "slow" });
            assert.equal(error, undefined);
            await world.until(() => received.length);
            assert.deepEqual([received[0].payload.status, received[0].errcode], ["dead", "M_TOO_LARGE"]);
            assert.equal(shown(node("n")).text, "it is too large");
        });

        it("is unknown, and that is told as well", async () => {
            answer = () => [200, { deliveries: [] }];
            const { ask, received, ends } = await loaded();
            await ask({ payload: "forgotten" });
            await world.until(() => received.length);
            const sentence = "what became of this message is unknown: the bridge does not know d1 any more";
            assert.deepEqual(received[0].payload, { delivery_id: "d1", status: "unknown", error: { error: sentence } });
            assert.deepEqual([...ends.values()], [1]);
        });

        it("is not told of where there are too many, and that is said", async () => {
            answer = () => [200, { deliveries: [] }];
            const { ask, ends } = await loaded();
            bridge().deliveries.most = 0;
            const { error } = await ask({ payload: "too many" });
            bridge().deliveries.most = 10_000;
            assert.equal(error, undefined, "it is accepted all the same");
            assert.deepEqual([...ends.values()], [1]);
            assert.match(bridge().warn.lastCall.args[0], /deliveries\.full/);
        });
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
