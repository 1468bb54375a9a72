"use strict";
// How the outcomes of many events are asked for, in front of a bridge that answers what no real one does when it is wanted.

const assert = require("node:assert/strict");

const { Deliveries } = require("../lib/deliveries");
const { BridgeError, Unreachable } = require("../lib/errors");

const QUICK = { first: 2, gather: 1 }; // ms

describe("what became of deliveries", () => {
    let deliveries;

    afterEach(() => deliveries.stop());

    /** What a client is asked, each time with the ids and the key; `answer(ids, number)` says what is known. */
    function asking(answer) {
        const asked = [];
        const client = {
            async call(method, path, { query, key }) {
                assert.deepEqual([method, path], ["GET", "/deliveries"]);
                const ids = query.id.split(",");
                assert.ok(ids.length <= query.limit, "all of them fit into one page");
                asked.push({ ids, key });
                const found = await answer(ids, asked.length);
                return { body: { deliveries: found } };
            },
        };
        return { client, asked };
    }

    const all = (status) => (ids) => ids.map((id) => ({ delivery_id: id, status }));
    const until = async (look) => {
        while (!look()) await new Promise((resolve) => setTimeout(resolve, 2));
    };

    function begin(client, options) {
        deliveries = new Deliveries({ ...QUICK, ...options });
        deliveries.start(client);
        const told = [];
        const watch = (id, more = {}) => deliveries.watch({ id, owner: "n", size: 10, tell: (outcome) => void told.push([id, outcome.message ?? outcome.status]), ...more });
        return { told, watch };
    }

    it("is asked for 100 at a time, until each is settled", async () => {
        const { client, asked } = asking((ids, number) => all(number < 4 ? "queued" : "sent")(ids));
        const { told, watch } = begin(client);
        for (let number = 0; number < 250; number += 1) assert.equal(watch(`d${number}`), true);
        assert.equal(deliveries.waiting("n"), 250);
        await until(() => told.length === 250);
        assert.equal(new Set(told.map(([id]) => id)).size, 250);
        assert.ok(asked.every(({ ids }) => ids.length <= 100));
        assert.ok(asked.length < 20, `${asked.length} questions for 250 events`);
        assert.deepEqual([deliveries.waiting("n"), deliveries.bytes], [0, 0]);
    });

    it("is one question at a time, of one account", async () => {
        let open = 0;
        const { client, asked } = asking(async (ids) => {
            assert.equal((open += 1), 1);
            await new Promise((resolve) => setTimeout(resolve, 3));
            open -= 1;
            return all("sent")(ids);
        });
        const { told, watch } = begin(client);
        for (const key of ["a", undefined, "b", "a"]) watch(`d${told.length}${key}${Math.random()}`, { key });
        await until(() => told.length === 4);
        assert.deepEqual(asked.map(({ key, ids }) => [key, ids.length]).sort(), [["a", 2], ["b", 1], [undefined, 1]].sort());
    });

    it("waits for a bridge that is away, as long as it says", async () => {
        const times = [];
        const { client } = asking((ids, number) => {
            times.push(Date.now());
            if (number === 1) throw new Unreachable("connection refused");
            if (number === 2) throw new BridgeError("later", { status: 429, errcode: "M_LIMIT_EXCEEDED", retryAfter: 40 });
            return all("dead")(ids);
        });
        const { told, watch } = begin(client);
        watch("d");
        await until(() => told.length);
        assert.deepEqual(told, [["d", "dead"]]);
        assert.ok(times[2] - times[1] >= 39);
    });

    it("is unknown when the bridge does not know it any more, or refuses to say", async () => {
        const { client } = asking((ids) => {
            if (ids.includes("refused")) throw new BridgeError("this key was revoked", { status: 401, errcode: "M_UNKNOWN_TOKEN" });
            return [];
        });
        const { told, watch } = begin(client);
        watch("gone");
        watch("refused", { key: "other" });
        await until(() => told.length === 2);
        assert.deepEqual(told.map(([, text]) => text).sort(), [
            "what became of this message is unknown: the bridge does not know gone any more",
            "what became of this message is unknown: this key was revoked",
        ]);
    });

    it("is not watched beyond a number and a size, and that is said", async () => {
        const said = [];
        let status = "queued";
        const { client } = asking((ids) => all(status)(ids));
        const { told, watch } = begin(client, { most: 10, mostBytes: 1_000, full: (number) => said.push(number) });
        assert.equal(watch("large", { size: 1_001 }), false);
        for (let number = 0; number < 10; number += 1) assert.equal(watch(`d${number}`), true);
        for (let number = 0; number < 5; number += 1) assert.equal(watch(`more${number}`), false);
        assert.deepEqual(said, [1], "once, not with each");
        status = "sent";
        await until(() => told.length === 10);
        assert.deepEqual(said, [1, 6]);
        assert.equal(watch("again"), true);
    });

    it("goes on after a stop, with another client, and tells whoever comes back for it", async () => {
        const { client: first, asked } = asking(all("queued"));
        const { told, watch } = begin(first);
        let isBack = false;
        watch("d", { tell: (outcome) => isBack && void told.push(["d", outcome.status]) });
        await until(() => asked.length);
        deliveries.stop();
        const before = asked.length;
        const { client: second, asked: again } = asking(all("sent"));
        deliveries.start(second);
        await until(() => again.length > 1); // nobody took it the first time
        isBack = true;
        await until(() => told.length);
        assert.deepEqual([told, asked.length], [[["d", "sent"]], before]);
    });

    it("is forgotten when nobody comes back for it", async () => {
        const { client } = asking(all("sent"));
        const { watch } = begin(client);
        let calls = 0;
        watch("d", { tell: () => (calls += 1) < 0 });
        await until(() => deliveries.waiting("n") === 0 && !deliveries.watched.size && calls > 5);
        assert.equal(calls, 6);
    });

    it("is of no concern to others when its own listener fails", async () => {
        const { client } = asking(all("sent"));
        const { told, watch } = begin(client);
        watch("bad", { tell: () => { throw new Error("mine"); } });
        watch("good");
        await until(() => told.length);
        assert.equal(deliveries.watched.size, 0);
    });
});
