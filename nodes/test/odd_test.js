"use strict";
// Whatever a flow may hold: each message ends once, with one sentence, and Node-RED lives on.

const assert = require("node:assert/strict");

const { load, unload } = require("./flow");
const world = require("./world");

function circular() {
    const found = { msgtype: "m.text" };
    found.self = found;
    return found;
}

function deep(depth) {
    let found = {};
    for (let level = 0; level < depth; level += 1) found = { found };
    return found;
}

/** 200 values that nobody should send. */
function odd() {
    const thrower = { toJSON: () => { throw new Error("no JSON\nof mine"); } };
    const getter = { get body() { throw new Error("not yours"); } };
    const revoked = Proxy.revocable({}, {});
    revoked.revoke();
    const found = [
        undefined, null, NaN, Infinity, -Infinity, -0, 0, 2 ** 60, true, false, "", " ", "\0", "\ud800", "a\udfffb", "\u202e",
        "x".repeat(70_000), "é".repeat(40_000), Symbol("s"), () => {}, async () => {}, function named() {}, class X {}, 10n, 10n ** 400n,
        [], [1], [[[]]], ["text"], new Array(5), new Array(1e5).fill(0), {}, { body: 1 }, { msgtype: 5 }, { msgtype: "m.text" },
        { msgtype: "m.image" }, { msgtype: "nonsense", body: "x" }, { body: "\ud800", msgtype: "m.text" }, { ["\ud800"]: 1 },
        { type: "m.room.message" }, { type: 5, content: {} }, { type: "", content: {} }, { type: "m.x/y", content: { a: 1 } },
        { type: "m.room.message", content: null }, { type: "m.room.message", content: [] }, { type: "../..", content: {} },
        { type: "x".repeat(300), content: {} }, { type: "\ud800", content: {} }, { payload: {} }, { payload: { payload: {} } },
        { payload: null }, circular(), { msgtype: "m.text", body: circular() }, deep(200), deep(20_000), thrower, getter, revoked.proxy,
        new Proxy({}, { get: () => { throw new Error("trap"); } }),
        new Proxy({}, { ownKeys: () => { throw new Error("keys"); } }),
        Object.create(null), Object.freeze({ body: "x", msgtype: "m.text" }), new Date(), new Date(NaN), /regexp/, new Error("an error"),
        new Map([[1, 2]]), new Set([1]), new WeakMap(), Promise.resolve(1), new Uint8Array(0), new Uint8Array(3), new Float64Array(3),
        new ArrayBuffer(8), new SharedArrayBuffer(8), new DataView(new ArrayBuffer(4)), Buffer.alloc(0), Buffer.from("text"),
        Buffer.alloc(10 * 1024 * 1024, 7), { type: "Buffer", data: [1, 2, 3] }, { __proto__: { msgtype: "m.text", body: "inherited" } },
        JSON.parse('{"__proto__": {"a": 1}}'), { constructor: 1 }, { hasOwnProperty: 1 }, { then: () => {} }, { toString: null },
        new URL("http://x"), new Intl.NumberFormat(), globalThis.process, globalThis, require("node:http").globalAgent,
        { msgtype: "m.text", body: "x", "m.mentions": "y" }, { msgtype: "m.text", body: "x".repeat(66_000) }, { "": "" },
    ];
    for (let number = 0; found.length < 200; number += 1) {
        found.push([{ n: number / 3, msgtype: number }, `${number}\u0000`, [number], { body: { number } }, { msgtype: "m.file", url: number }][number % 5]);
    }
    return found;
}

const named = (value) => {
    try {
        return String(value).slice(0, 40);
    } catch {
        return typeof value;
    }
};

describe("odd values", function () {
    this.timeout(600_000);
    let room;
    const escaped = [];
    const note = (error) => escaped.push(error);

    before(async () => {
        await world.open();
        room = await world.room();
        process.on("uncaughtException", note);
        process.on("unhandledRejection", note);
    });
    after(() => {
        process.off("uncaughtException", note);
        process.off("unhandledRejection", note);
    });
    afterEach(unload);

    const NODES = [
        { id: "send", type: "flowbridge send", payload: "payload", payloadType: "msg" },
        { id: "send-text", type: "flowbridge send", as: "text", payload: "payload", payloadType: "msg" },
        { id: "send-strict", type: "flowbridge send", as: "markdown", objects: "refuse", title: "payload", titleType: "msg", payload: "payload", payloadType: "msg" },
        { id: "send-files", type: "flowbridge send", as: "html", attachments: "payload", attachmentsType: "msg", payload: "text", payloadType: "str" },
        ...["title", "mentions", "msgtype", "messageKey", "onUpdate", "replyTo", "thread", "edit"].map((option) => ({
            id: `send-${option}`,
            type: "flowbridge send",
            as: "text",
            payload: "text",
            payloadType: "str",
            [option]: "payload",
            [`${option}Type`]: "msg",
        })),
        ...["react", "redact", "read", "typing"].map((operation) => ({
            id: operation,
            type: "flowbridge react",
            operation,
            target: operation === "react" ? "$event" : "payload",
            targetType: operation === "react" ? "str" : "msg",
            emoji: "payload",
            emojiType: "msg",
            reason: "payload",
            reasonType: "msg",
            seconds: "payload",
            secondsType: "msg",
        })),
        { id: "send-state", type: "flowbridge send", eventType: "m.room.topic" },
        ...["invite", "name", "avatar", "pinned", "state"].map((operation) => ({
            id: operation,
            type: "flowbridge room",
            operation,
            value: "payload",
            valueType: "msg",
        })),
        { id: "login", type: "flowbridge account", operation: "login", user: "payload", userType: "msg" },
    ];

    for (const { id } of NODES) {
        it(`end each message once at ${id}`, async () => {
            const { ask, ends } = await load(NODES);
            for (const payload of odd()) {
                const { error } = await ask({ payload, roomId: room }, id);
                if (!error) continue;
                assert.equal(typeof error.message, "string", named(payload));
                assert.ok(error.message.length && !error.message.includes("\n"), `${named(payload)}: ${error.message}`);
                assert.ok(Array.isArray(error.problems), named(payload));
            }
            assert.deepEqual([...new Set(ends.values())], [1]);
            assert.equal(ends.size, 200);
            assert.deepEqual(escaped, []);
        });
    }

    it("as a room, a key, a token or a name of a file end with a sentence, too", async () => {
        const { ask, ends } = await load([{ id: "n", type: "flowbridge send", key: "key", keyType: "msg" }]);
        for (const value of odd()) {
            for (const msg of [
                { payload: "x", roomId: value, topic: value },
                { payload: "x", roomId: room, accessToken: value },
                { payload: Buffer.from("x"), roomId: room, filename: value, contentType: value, headers: value },
            ]) {
                const { error } = await ask(msg);
                if (error) assert.ok(error.message.length && !error.message.includes("\n"), `${named(value)}: ${error.message}`);
            }
        }
        assert.deepEqual([...new Set(ends.values())], [1]);
        assert.deepEqual(escaped, []);
    });
});
