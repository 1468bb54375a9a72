"use strict";
// The mistakes that people make with the bridge's address, and what they are told.

const assert = require("node:assert/strict");
const { execFileSync } = require("node:child_process");
const fs = require("node:fs");
const http = require("node:http");
const https = require("node:https");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");

const { Client } = require("../lib/client");
const { wordsOf } = require("../lib/node");
const { load, shown, unload } = require("./flow");
const world = require("./world");

const said = (url, options) => {
    try {
        return new Client({ url, ...options }).call("GET", "/whoami").then(() => "", ({ message }) => message);
    } catch (error) {
        return Promise.resolve(error.message);
    }
};

describe("the bridge's address", () => {
    let facts, host;
    const servers = [];

    before(async () => {
        facts = await world.open();
        host = new URL(facts.bridge).host;
    });
    afterEach(unload);
    after(() => servers.forEach((server) => server.close()));

    const at = async (server) => {
        servers.push(server);
        await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
        return `127.0.0.1:${server.address().port}`;
    };

    it("is a URL, with its scheme", async () => {
        for (const [url, sentence] of [
            ["localhost:8090", '"localhost:8090" is not a URL, which begins with http:// or https://: write http://localhost:8090'],
            ["192.168.1.7:8090/", '"192.168.1.7:8090/" is not a URL, which begins with http:// or https://: write http://192.168.1.7:8090/'],
            ["bridge.lan", '"bridge.lan" is not a URL, which begins with http:// or https://: write http://bridge.lan'],
            ["[::1]:8090", '"[::1]:8090" is not a URL, which begins with http:// or https://: write http://[::1]:8090'],
            ["https:/bridge.lan", '"https:/bridge.lan" is not a URL, which begins with http:// or https://: write https://bridge.lan'],
            ["http//bridge.lan", '"http//bridge.lan" is not a URL, which begins with http:// or https://: write http://bridge.lan'],
            ["http://local host:8090", '"http://local host:8090" is not a URL: there is a space in it'],
            ["nonsense!", '"nonsense!" is not a URL, such as http://localhost:8090'],
            ["http://", '"http://" is not a URL, such as http://localhost:8090'],
            ["ftp://bridge.lan", "ftp:// is not http:// or https://"],
            ["http://me@bridge.lan", "the URL contains a user, a query or a fragment: leave them out, and put the key into its own field"],
            ["http://bridge.lan/#top", "the URL contains a user, a query or a fragment: leave them out, and put the key into its own field"],
            ["http://bridge.lan/_matrix/client/v3", "the bridge's URL ends before /_matrix/client/v3: write http://bridge.lan"],
            ["https://lan/bridge/_matrix", "the bridge's URL ends before /_matrix: write https://lan/bridge"],
        ]) {
            assert.equal(await said(url), sentence);
        }
    });

    it("is spoken of in Node-RED's language, where it has one", async () => {
        const german = require("../locales/de/flowbridge-server.json");
        const textOf = (key) => key.split(".").reduce((found, part) => found && found[part], german);
        const speaking = { _: (key, values) => (textOf(key) ?? key).replace(/__(\w+)__/g, (_, name) => values[name]) };
        const words = wordsOf(speaking, "flowbridge-server", "address");
        assert.match(await said("localhost:8090", { words }), /^„localhost:8090“ ist keine URL, .+: schreibe http:\/\/localhost:8090$/);
        assert.match(await said(facts.homeserver, { words }), /ist ein Matrix-Homeserver, keine flowbridge/);
    });

    it("may have blanks around it and a slash behind it", async () => {
        assert.equal(await said(` ${facts.bridge}/ `, { key: facts.key }), "");
    });

    it("is the bridge's, not the homeserver's", async () => {
        const sentence = `${facts.homeserver}/ is a Matrix homeserver, not a flowbridge: write the bridge's own address, such as http://localhost:8090`;
        assert.equal(await said(facts.homeserver, { key: facts.key }), sentence);
        const { ask, node } = await load([{ id: "n", type: "flowbridge send", room: "!any:localhost" }, { id: "l", type: "flowbridge listen" }], {
            server: { url: facts.homeserver },
        });
        const { error } = await ask({ payload: "x" });
        assert.deepEqual([error.message, error.errcode, error.status], [sentence, undefined, 404]);
        await world.until(() => node("l").said === sentence);
    });

    it("is http where the bridge speaks http", async () => {
        const sentence = `the bridge speaks http at this address, not https: write http://${host}`;
        assert.equal(await said(`https://${host}`), sentence);
        const { ask, node } = await load([{ id: "n", type: "flowbridge room", operation: "members", room: "!any:localhost" }, { id: "l", type: "flowbridge listen" }], {
            server: { url: `https://${host}` },
        });
        assert.equal((await ask({})).error.message, sentence);
        await world.until(() => /^the bridge speaks http at this address/.test(shown(node("l")).text));
    });

    it("ends where the bridge's paths begin", async () => {
        assert.equal(await said(`${facts.bridge}/docs`, { key: facts.key }), `the bridge's URL ends before /docs: write ${facts.bridge}`);
        assert.equal(await said(`${facts.bridge}/rooms/`, { key: facts.key }), `the bridge's URL ends before /rooms/: write ${facts.bridge}`);
    });

    it("is that of a bridge", async () => {
        const page = http.createServer((request, response) => response.writeHead(404, { "content-type": "text/html" }).end("<html>"));
        const address = await at(page);
        assert.equal(await said(`http://${address}`), `http://${address}/ answers 404, and is not a flowbridge`);
    });

    it("gets no key when it may not be a bridge's", async () => {
        const keys = [];
        const address = await at(
            http.createServer((request, response) => {
                keys.push([request.url, request.headers.authorization]);
                response.writeHead(404).end();
            }),
        );
        await said(`http://${address}`, { key: "fb_mine" });
        assert.deepEqual(keys[0], ["/whoami", "Bearer fb_mine"]);
        assert.ok(keys.length > 1 && keys.slice(1).every(([, key]) => key === undefined));
    });

    describe("with TLS", () => {
        let identity;

        before(() => {
            const folder = fs.mkdtempSync(path.join(os.tmpdir(), "certificate-"));
            const key = path.join(folder, "key.pem");
            const cert = path.join(folder, "cert.pem");
            const command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout", key, "-out", cert];
            execFileSync("openssl", command, { stdio: "ignore" });
            identity = { key: fs.readFileSync(key), cert: fs.readFileSync(cert) };
            fs.rmSync(folder, { recursive: true });
        });

        const bridge = (request, response) => response.writeHead(200).end('{"status": "ok", "version": "0.1.0"}');

        it("says that a certificate is not trusted, and where to say which authority is", async () => {
            const address = await at(https.createServer(identity, bridge));
            assert.match(
                await said(`https://${address}`),
                new RegExp(`^the certificate of https://${address} is not trusted \\(.+\\): choose a TLS configuration with its authority$`),
            );
        });

        it("says that it is https where a proxy answers http with a 400", async () => {
            const secure = https.createServer(identity, bridge);
            const door = net.createServer((socket) =>
                socket.once("data", (data) => {
                    if (data[0] !== 0x16) return socket.end("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n<html>The plain HTTP request was sent to HTTPS port</html>");
                    socket.pause();
                    socket.unshift(data);
                    secure.emit("connection", socket);
                    return process.nextTick(() => socket.resume());
                }),
            );
            const address = await at(door);
            assert.equal(await said(`http://${address}`), `the bridge speaks https at this address, not http: write https://${address}`);
        });
    });
});
