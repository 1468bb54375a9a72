"use strict";
// The stream itself, in front of servers that do what no bridge should.

const assert = require("node:assert/strict");
const http = require("node:http");

const { Client } = require("../lib/client");
const { Live, Parser } = require("../lib/live");

const PAUSE = 5; // ms

describe("the live stream", () => {
    let server, live;

    afterEach(() => {
        if (live) live.stop();
        if (server) server.close();
        live = server = undefined;
    });

    /** A stream from a server that answers with `answers`, one after another, the last one again and again. */
    async function streaming(...answers) {
        const asked = [];
        server = http.createServer((request, response) => {
            asked.push(request.headers["last-event-id"]);
            answers[Math.min(asked.length, answers.length) - 1](response);
        });
        await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
        live = new Live(new Client({ url: `http://127.0.0.1:${server.address().port}` }), { first: PAUSE });
        const seen = { asked, events: [], lost: [] };
        live.on("event", (event) => seen.events.push(event.n));
        live.on("lost", (why, refused) => seen.lost.push([why, refused]));
        live.start();
        return seen;
    }

    const sends = (...texts) => (response) => {
        response.writeHead(200, { "content-type": "text/event-stream" });
        for (const text of texts) response.write(text);
    };
    const sendsAndEnds = (...texts) => (response) => {
        sends(...texts)(response);
        response.end();
    };
    const until = async (look) => {
        while (!look()) await new Promise((resolve) => setTimeout(resolve, 2));
    };

    it("reads messages however they are cut, and whatever ends their lines", () => {
        const text = 'id: 1\ndata: {"n": "é€😀"}\n\n:\n\nretry: 3000\r\n\r\ndata: a\ndata: b\n\nid: 2\r\nevent: error\rdata: x\n\n';
        const bytes = Buffer.from(text);
        const whole = [];
        new Parser((message) => whole.push(message)).feed(bytes);
        assert.deepEqual(whole, [{ id: "1", data: '{"n": "é€😀"}' }, { data: "a\nb" }, { id: "2", event: "error", data: "x" }]);
        for (let cut = 1; cut < bytes.length; cut += 1) {
            const found = [];
            const parser = new Parser((message) => found.push(message));
            parser.feed(bytes.subarray(0, cut));
            parser.feed(bytes.subarray(cut));
            assert.deepEqual(found, whole, `cut at ${cut}`);
        }
    });

    it("goes on behind the last event that it has told", async () => {
        const seen = await streaming(
            sendsAndEnds('id: a\ndata: {"n": 1}\n\n', 'id: b\ndata: {"n": 2}\n\nid: half\ndata: {"n"'),
            sends('id: c\ndata: {"n": 3}\n\n'),
        );
        await until(() => seen.events.length === 3);
        assert.deepEqual(seen.asked, [undefined, "b"]);
        assert.deepEqual(seen.events, [1, 2, 3]);
    });

    it("forgets a position that the bridge does not take", async () => {
        const refuses = (response) => {
            response.writeHead(400, { "content-type": "application/json" });
            response.end('{"errcode": "M_INVALID_PARAM", "error": "Last-Event-ID: no"}');
        };
        const seen = await streaming(sendsAndEnds('id: a\ndata: {"n": 1}\n\n'), refuses, sends('id: b\ndata: {"n": 2}\n\n'));
        await until(() => seen.events.length === 2);
        assert.deepEqual(seen.asked, [undefined, "a", undefined]);
    });

    it("says that a web page is not a flowbridge", async () => {
        const seen = await streaming((response) => {
            response.writeHead(200, { "content-type": "text/html" });
            response.end("<html>");
        });
        await until(() => seen.lost.length);
        assert.match(seen.lost[0][0], /answers 200, and is not a flowbridge/);
        assert.equal(seen.lost[0][1], true);
    });

    it("hears why the bridge ends it", async () => {
        const last = (errcode) => sendsAndEnds(`event: error\ndata: {"errcode": "${errcode}", "error": "so it is"}\n\n`);
        let seen = await streaming(last("M_LIMIT_EXCEEDED"));
        await until(() => seen.lost.length > 1);
        assert.deepEqual(seen.lost[0], ["so it is", false]);
        live.stop();
        server.close();
        seen = await streaming(last("M_UNKNOWN_TOKEN"));
        await until(() => seen.lost.length);
        assert.deepEqual(seen.lost[0], ["so it is", true]);
    });

    it("is not hurt by what is no event", async () => {
        const odd = ["data: no json\n\n", "data: 5\n\n", "data: null\n\n", "data\n\n", ": x\n\n", "id\n\n", "nonsense\n\n"];
        odd.push('event: invite\ndata: {"n": 2}\n\n'); // an invitation is none
        const seen = await streaming(sends(...odd, 'id: a\ndata: {"n": 1}\n\n'));
        await until(() => seen.events.length);
        assert.deepEqual([seen.events, seen.lost], [[1], []]);
    });

    it("is given up after so many characters without an end", async () => {
        const seen = await streaming(sends(`data: ${"x".repeat(9 * 1024 * 1024)}`));
        await until(() => seen.lost.length);
        assert.match(seen.lost[0][0], /no events/);
    });
});
