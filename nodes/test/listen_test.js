"use strict";

const assert = require("node:assert/strict");
const http = require("node:http");

const { helper, load, shown, unload } = require("./flow");
const world = require("./world");

const LISTEN = { id: "n", type: "flowbridge listen" };

describe("flowbridge listen", () => {
    let facts, room;

    before(async () => {
        facts = await world.open();
        room = await world.room({ invite: [facts.friend.user_id] });
        await world.matrix(facts.friend, "POST", `/rooms/${encodeURIComponent(room)}/join`, {});
    });
    afterEach(unload);

    let number = 0;

    async function say(account, content, { type = "m.room.message", into = room } = {}) {
        const body = typeof content === "string" ? { msgtype: "m.text", body: content } : content;
        const target = `/rooms/${encodeURIComponent(into)}/send/${type}/${process.pid}-${Date.now()}-${(number += 1)}`;
        return (await world.matrix(account, "PUT", target, body)).event_id;
    }

    async function listening(nodes, options) {
        const flow = await load(nodes, options);
        await world.until(() => nodes.every(({ id }) => shown(flow.node(id)).fill === "green"));
        return flow;
    }

    const heard = (received) => received.map((msg) => msg.payload.body);

    it("starts a flow with the content, the room and the whole event", async () => {
        const { received } = await listening([LISTEN]);
        const eventId = await say(facts.friend, "hello");
        await world.until(() => received.length);
        const [msg] = received;
        assert.deepEqual(msg.payload, { msgtype: "m.text", body: "hello" });
        assert.equal(msg.topic, room);
        assert.deepEqual([msg.roomId, msg.eventId, msg.sender], [room, eventId, facts.friend.user_id]);
        assert.equal(msg.event.event_id, eventId);
        assert.equal(msg.event.type, "m.room.message");
    });

    it("hears own events when it is told to", async () => {
        const { received, node } = await listening([LISTEN, { ...LISTEN, id: "own", own: true, wires: [["out"]] }]);
        await say(facts.bot, "mine");
        await say(facts.friend, "theirs");
        await world.until(() => received.length >= 3);
        assert.deepEqual(heard(received).sort(), ["mine", "theirs", "theirs"]);
        assert.equal(shown(node("own")).shape, "dot");
    });

    for (const [what, config, wanted] of [
        ["type", { types: "m.reaction" }, ["reaction"]],
        ["types, one with a star", { types: "m.rea*, org.example.x" }, ["reaction", "own type"]],
        ["msgtype", { types: "m.room.message", msgtypes: "m.notice, m.emote" }, ["notice"]],
        ["sender", { types: "m.room.message", senders: "@friend:localhost" }, ["text", "notice", "last"]],
        ["sender who is somebody else", { types: "m.room.message", senders: "@nobody:localhost" }, []],
        ["nothing at all", { types: "" }, ["text", "notice", "reaction", "own type", "last"]],
    ]) {
        it(`chooses by ${what}`, async () => {
            const { received } = await listening([
                { ...LISTEN, ...config },
                { ...LISTEN, id: "last", types: "m.room.message", wires: [[]] },
            ]);
            let ends = false;
            helper.getNode("last").send = (msg) => (ends = msg.payload.body === "last");
            await say(facts.friend, "text");
            await say(facts.friend, { msgtype: "m.notice", body: "notice" });
            await say(facts.friend, { body: "reaction" }, { type: "m.reaction" });
            await say(facts.friend, { body: "own type" }, { type: "org.example.x" });
            await say(facts.friend, "last");
            await world.until(() => ends);
            await world.until(() => received.length >= wanted.length);
            assert.deepEqual(heard(received), wanted);
        });
    }

    it("listens to one room, by its id and by its alias", async () => {
        const name = `listen${Date.now()}`;
        const other = await world.room({ room_alias_name: name });
        const { received } = await listening([
            { ...LISTEN, room: other, own: true },
            { ...LISTEN, id: "alias", room: `#${name}:localhost`, own: true },
        ]);
        await say(facts.friend, "elsewhere");
        await say(facts.bot, "here", { into: other });
        await world.until(() => received.length >= 2);
        assert.deepEqual(heard(received), ["here", "here"]);
    });

    it("shares one stream with all listeners", async () => {
        await listening([1, 2, 3, 4].map((id) => ({ ...LISTEN, id: `n${id}` })));
        const metrics = async () => (await fetch(`${facts.bridge}/metrics`)).text();
        const one = /flowbridge_live_listeners(?:\{[^}]*\})? 1(?:\.0)?\n/;
        await world.until(async () => one.test(await metrics())); // those of the test before are gone by then
    });

    it("goes on without gap or repeat when the bridge comes back, and says so meanwhile", async () => {
        const { received, node } = await listening([LISTEN]);
        await say(facts.friend, "before");
        await world.until(() => received.length === 1);
        await world.bridge("kill");
        await world.until(() => shown(node("n")).fill === "red");
        for (const body of ["a", "b", "c"]) await say(facts.friend, body);
        await world.bridge("start");
        await say(facts.friend, "after");
        await world.until(() => received.length >= 5);
        assert.deepEqual(heard(received), ["before", "a", "b", "c", "after"]);
        await world.until(() => shown(node("n")).fill === "green");
    });

    it("hears what happened while the flow was deployed anew", async () => {
        const { received, redeploy } = await listening([LISTEN]);
        await say(facts.friend, "one");
        await world.until(() => received.length === 1);
        await world.bridge("kill");
        await redeploy();
        await say(facts.friend, "in between");
        await world.bridge("start");
        await world.until(() => received.length === 2);
        assert.deepEqual(heard(received), ["one", "in between"]);
    });

    describe("in an encrypted room", () => {
        const ENCRYPTION = { algorithm: "m.megolm.v1.aes-sha2" };
        const CIPHERTEXT = { ...ENCRYPTION, ciphertext: "abc", session_id: "s", sender_key: "k", device_id: "D" };
        const encrypt = (id) => world.matrix(facts.bot, "PUT", `/rooms/${encodeURIComponent(id)}/state/m.room.encryption`, ENCRYPTION);
        const roomOfBoth = async (settings) => {
            const id = await world.room({ invite: [facts.friend.user_id], ...settings });
            await world.matrix(facts.friend, "POST", `/rooms/${encodeURIComponent(id)}/join`, {});
            return id;
        };
        const isShown = (node, words) => world.until(() => words.test(shown(node).text));

        it("says so, instead of waiting in silence", async () => {
            const secret = await roomOfBoth({ initial_state: [{ type: "m.room.encryption", state_key: "", content: ENCRYPTION }] });
            const { node } = await load([{ ...LISTEN, room: secret }]);
            await isShown(node("n"), /status\.encrypted/);
            assert.equal(shown(node("n")).fill, "yellow");
            assert.equal(node("n").warn.callCount, 1);
        });

        it("says so as soon as the room becomes encrypted", async () => {
            const own = await roomOfBoth();
            const { node } = await listening([{ ...LISTEN, room: own }, { ...LISTEN, id: "all" }]);
            assert.match(shown(node("n")).text, /status\.connected/);
            await encrypt(own);
            await isShown(node("n"), /status\.encrypted/);
            await isShown(node("all"), /status\.some/);
            assert.equal(shown(node("all")).fill, "green", "the other rooms can be read");
        });

        it("passes encrypted events on as such, or leaves them out", async () => {
            const own = await roomOfBoth();
            const { received, node } = await load([
                { ...LISTEN, room: own, types: "" },
                { ...LISTEN, id: "skips", room: own, types: "", skipEncrypted: true, wires: [["out"]] },
            ]);
            await world.until(() => node("n").knows && node("skips").knows);
            await say(facts.friend, CIPHERTEXT, { type: "m.room.encrypted", into: own });
            await say(facts.friend, "plain", { into: own });
            await world.until(() => received.length >= 3);
            assert.deepEqual(received.map((msg) => [msg.payload.ciphertext || msg.payload.body, msg.encrypted]).sort(), [
                ["abc", true],
                ["plain", undefined],
                ["plain", undefined],
            ]);
        });
    });

    it("listens all the same with a key that may not hear of encryption", async () => {
        // The world's key may do anything; this bridge's is for messages.
        const asked = [];
        const server = http.createServer((request, response) => {
            const { pathname, searchParams } = new URL(request.url, "http://bridge");
            if (pathname !== "/live") return response.writeHead(503).end('{"errcode": "M_UNKNOWN", "error": "not now"}');
            asked.push(searchParams.get("types"));
            if (asked.length > 1) return response.writeHead(200, { "content-type": "text/event-stream" }).write(":\n\n");
            return response.writeHead(403).end('{"errcode": "M_FORBIDDEN", "error": "this API key is not for m.room.encryption"}');
        });
        await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
        const { node } = await load([{ ...LISTEN, types: "m.room.message", room, own: true }], { server: { url: `http://127.0.0.1:${server.address().port}` } });
        await world.until(() => shown(node("n")).fill === "green");
        assert.deepEqual(asked, ["m.room.encryption,m.room.message", "m.room.message"]);
        server.closeAllConnections();
        server.close();
    });

    describe("behind a bridge that decrypts", () => {
        const ROOM = "!secret:localhost";
        const FILE = { msgtype: "m.image", body: "a.png", file: { url: "mxc://localhost/abc" } };
        const READ = { type: "m.room.message", room_id: ROOM, sender: "@friend:localhost" };
        const told = { encrypted: true, verified: true, sender_device: "D" };
        let server, stream;

        /** Listens to a bridge of a few lines, whose stream `say` writes to. */
        async function decrypting(config = {}) {
            const answers = {
                "/rooms": { rooms: [{ room_id: ROOM, encrypted: true }], encrypted_rooms: "encrypt" },
                "/whoami": { user_id: "@bot:localhost" },
            };
            server = http.createServer((request, response) => {
                const { pathname } = new URL(request.url, "http://bridge");
                if (pathname !== "/live") return response.end(JSON.stringify(answers[pathname] || {}));
                stream = response.writeHead(200, { "content-type": "text/event-stream" });
                stream.write(":\n\n");
            });
            await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
            const url = `http://127.0.0.1:${server.address().port}`;
            const flow = await load([{ ...LISTEN, room: ROOM, types: "", skipEncrypted: true, ...config }], { server: { url } });
            await world.until(() => shown(flow.node("n")).text === "flowbridge-listen.status.decrypts");
            return { ...flow, url };
        }

        const tell = (event) => stream.write(`data: ${JSON.stringify({ ...READ, event_id: "$e", ...event })}\n\n`);

        afterEach(() => {
            server.closeAllConnections();
            server.close();
        });

        it("gives decrypted events, and says whether their sender is verified", async () => {
            const { received, node } = await decrypting();
            assert.deepEqual([shown(node("n")).fill, node("n").warn.callCount], ["green", 0]);
            tell({ content: { body: "one" }, flowbridge: told });
            tell({ content: { body: "two" }, flowbridge: { ...told, verified: false, decrypted_later: true } });
            tell({ content: { body: "plain" } });
            await world.until(() => received.length === 3);
            assert.deepEqual(received.map((msg) => [msg.payload.body, msg.verified, msg.encrypted]), [
                ["one", true, undefined],
                ["two", false, undefined],
                ["plain", undefined, undefined],
            ]);
            assert.equal(received[1].event.flowbridge.decrypted_later, true);
        });

        it("shows why an event cannot be decrypted, until one can be", async () => {
            const { received, node } = await decrypting();
            tell({ type: "m.room.encrypted", content: {}, flowbridge: { encrypted: true, undecryptable: "no key" } });
            await world.until(() => shown(node("n")).text === "flowbridge-listen.status.unread");
            assert.equal(shown(node("n")).fill, "yellow");
            tell({ content: { body: "read" }, flowbridge: told });
            await world.until(() => shown(node("n")).text === "flowbridge-listen.status.decrypts");
            assert.deepEqual(heard(received), ["read"]);
        });

        it("says where the bridge has an event's file", async () => {
            const { received, url } = await decrypting();
            tell({ content: FILE, flowbridge: told });
            tell({ content: { url: "mxc://localhost/plain" } });
            for (const bad of ["mxc://../whoami", "mxc://a/../b", "https://elsewhere/x", 7]) tell({ content: { url: bad } });
            tell({ content: { file: null, url: null } });
            await world.until(() => received.length === 7);
            assert.deepEqual(received.map((msg) => msg.url), [
                `${url}/media/localhost/abc?room_id=%21secret%3Alocalhost&event_id=%24e`,
                `${url}/media/localhost/plain`,
                ...Array(5).fill(undefined),
            ]);
        });
    });

    it("says what is wrong with its configuration", async () => {
        for (const [config, options, words] of [
            [{ room: "nonsense" }, {}, /is not a room/],
            [{ room: "#nowhere:localhost" }, {}, /no room has the alias #nowhere:localhost/],
            [{ server: "" }, {}, /no flowbridge server/],
            [{}, { key: "fb_wrong" }, /key|token/i],
            [{}, { server: { url: "nonsense" } }, /is not a URL/],
            [{}, { server: { url: "http://127.0.0.1:1" } }, /connection refused/],
        ]) {
            const { node } = await load([{ ...LISTEN, ...config }], options);
            await world.until(() => shown(node("n")).fill === "red");
            assert.match(shown(node("n")).text, words);
            await unload();
        }
    });
});
