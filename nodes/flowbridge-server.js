"use strict";
// The bridge that the other nodes use: its address and key, one connection for calls, one stream for all listeners.

const { Client, InputError, segments } = require("./lib/client");
const { Live } = require("./lib/live");
const { evaluate } = require("./lib/values");

const TEST_SECONDS = 10;
const GATHER = 50; // ms: listeners come one after another when a flow starts
const SAVE = 1_000; // ms between two saved positions
const UNCHANGED = "__PWRD__"; // what the editor sends for a credential that it does not know

module.exports = function (RED) {
    const positions = new Map(); // by the server's id

    class Server {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.listeners = new Set();
            this.state = { open: false, why: "" };
            try {
                this.client = clientOf(RED, this, config, this.credentials);
            } catch (error) {
                this.problem = error;
                this.error(error.message);
            }
            this.on("close", (removed, done) => {
                this.stopLive();
                if (this.client) this.client.close();
                done();
            });
        }

        /** A call (lib/client.js), or the reason why there can be none. */
        async call(...request) {
            return this.usable().call(...request);
        }

        usable() {
            if (this.problem) throw this.problem;
            return this.client;
        }

        /** The id of a room; an alias is resolved without joining. */
        async roomId(room) {
            if (!room.startsWith("#")) return room;
            const { body } = await this.call("GET", "/rooms");
            const known = body.rooms.find((each) => each.canonical_alias === room);
            if (known) return known.room_id;
            const path = `${segments("rooms", room, "state", "m.room.create")}`;
            return (await this.call("GET", path, { query: { format: "event" } })).body.room_id;
        }

        /**
         * Tells a listener, `{types, event(event), state({open, why})}`, what happens from now on; returns how to end that.
         * `types`: the event types that it wants, none for all.
         */
        listen(listener) {
            this.listeners.add(listener);
            listener.state(this.problem ? { open: false, why: this.problem.message } : this.state);
            this.gather();
            return () => {
                this.listeners.delete(listener);
                this.gather();
            };
        }

        gather() {
            clearTimeout(this.gathering);
            if (!this.problem) this.gathering = setTimeout(() => this.arrange(), GATHER);
        }

        /** One stream with what all listeners want together. */
        arrange() {
            const wanted = [...this.listeners].map((listener) => listener.types);
            const types = wanted.some((each) => !each.length) ? "" : [...new Set(wanted.flat())].sort().join(",");
            if (this.live && this.listeners.size && types === this.live.query.types) return;
            const position = this.live ? this.live.position : positions.get(this.id) || this.context().get("position") || "";
            this.stopLive();
            if (!this.listeners.size) return;
            this.live = new Live(this.client, { query: { types }, position });
            this.live.on("open", () => this.tell({ open: true, why: "" }));
            this.live.on("lost", (why, refused) => this.tell({ open: false, why, refused }));
            this.live.on("event", (event) => this.hear(event));
            this.live.start();
        }

        hear(event) {
            for (const listener of this.listeners) {
                try {
                    listener.event(event);
                } catch (error) {
                    this.error(error); // a failing listener must not affect the others
                }
            }
            if (!this.saving) this.saving = setTimeout(() => this.save(), SAVE);
        }

        /**
         * Saves the stream's position, to continue there after a deploy (Node-RED forgets a node's context then, unless a
         * context store is configured) and, with a store on disk, after a restart.
         */
        save() {
            clearTimeout(this.saving);
            this.saving = undefined;
            if (!this.live || !this.live.position) return;
            positions.set(this.id, this.live.position);
            this.context().set("position", this.live.position);
        }

        tell(state) {
            this.state = state;
            for (const listener of this.listeners) listener.state(state);
        }

        stopLive() {
            clearTimeout(this.gathering);
            this.save();
            if (this.live) this.live.stop();
            this.live = undefined;
        }
    }

    RED.nodes.registerType("flowbridge-server", Server, {
        credentials: { key: { type: "password" } },
        settings: {},
    });

    /** What the dialogs ask the bridge, with the settings of a server that may not be deployed yet. */
    const QUESTIONS = {
        whoami: async (client) => (await client.call("GET", "/whoami")).body,
        rooms: async (client) => (await client.call("GET", "/rooms")).body.rooms,
        "event-types": async (client) => typesOf(await client.call("GET", "/schemas")),
    };

    // `write`, since the caller names the URL to which the stored key goes.
    RED.httpAdmin.post("/flowbridge/ask/:what", RED.auth.needsPermission("flowbridge-server.write"), async (request, response) => {
        let client;
        try {
            const ask = Object.hasOwn(QUESTIONS, request.params.what) && QUESTIONS[request.params.what];
            if (!ask) throw new InputError("there is no such question");
            const { id, key, ...config } = request.body || {};
            const stored = (RED.nodes.getCredentials(id) || {}).key;
            const node = RED.nodes.getNode(id) || undefined;
            const isStored = key === undefined || key === UNCHANGED;
            client = clientOf(RED, node, { ...config, timeout: TEST_SECONDS }, { key: isStored ? stored : key });
            response.json({ found: await ask(client) });
        } catch (error) {
            response.json({ error: error.message });
        } finally {
            if (client) client.close();
        }
    });
};

function clientOf(RED, node, config, credentials) {
    const url = evaluate(RED, node, config.url, config.urlType || "str");
    if (!url) {
        const name = config.urlType === "env" ? config.url : "the URL";
        throw new InputError(`${name || "FLOWBRIDGE_URL"} is not set`);
    }
    const tls = {};
    const tlsNode = config.tls && RED.nodes.getNode(config.tls);
    if (tlsNode) tlsNode.addTLSOptions(tls);
    const key = (credentials && credentials.key) || evaluate(RED, node, "FLOWBRIDGE_KEY", "env") || "";
    return new Client({ url: String(url), key: String(key).trim(), timeout: Number(config.timeout) || undefined, tls });
}

function typesOf({ body }) {
    return body.event_types.map(({ type, name, state }) => ({ type, name, state }));
}
