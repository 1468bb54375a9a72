"use strict";
// The bridge that the other nodes use: its address and key, one connection for calls, one stream for all listeners.

const { Client, segments } = require("./lib/client");
const { Deliveries } = require("./lib/deliveries");
const { InputError } = require("./lib/errors");
const { Live } = require("./lib/live");
const { wordsOf } = require("./lib/node");
const { evaluate } = require("./lib/values");

const TEST_SECONDS = 10;
const GATHER = 50; // ms: listeners come one after another when a flow starts
const SAVE = 1_000; // ms between two saved positions
const SHARED = 5_000; // ms that an answer about rooms counts: listeners ask when a flow starts
const LOOK = 600_000; // ms between two looks at which rooms are encrypted
const LOOK_AGAIN = 60_000; // after one that failed
const ENCRYPTION = "m.room.encryption";
const UNCHANGED = "__PWRD__"; // what the editor sends for a credential that it does not know

module.exports = function (RED) {
    // By the server's id: a deploy makes its node again.
    const positions = new Map();
    const queued = new Map();

    class Server {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.listeners = new Set();
            this.encrypted = new Set(); // ids of rooms
            this.decrypts = false; // whether the bridge reads encrypted rooms
            this.hearsEncryption = true; // until the bridge refuses that type
            this.state = { open: false, why: "" };
            try {
                this.client = clientOf(RED, this, config, this.credentials);
            } catch (error) {
                this.problem = error;
                this.error(error.message);
            }
            this.watchDeliveries();
            this.on("close", (removed, done) => {
                this.stopLive();
                this.deliveries.stop();
                if (removed) queued.delete(this.id);
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

        /** Learns what becomes of the events that the bridge has accepted, also of those from before a deploy. */
        watchDeliveries() {
            this.deliveries = queued.get(this.id) || new Deliveries();
            queued.set(this.id, this.deliveries);
            this.deliveries.full = (number) => this.warn(RED._("flowbridge-server.deliveries.full", { number, most: this.deliveries.most }));
            if (this.client) this.deliveries.start(this.client);
        }

        /** The id of a room; an alias is resolved without joining. */
        async roomId(room) {
            if (!room.startsWith("#")) return room;
            const known = (await this.rooms()).find((each) => each.canonical_alias === room);
            if (known) return known.room_id;
            const path = `${segments("rooms", room, "state", "m.room.create")}`;
            return (await this.call("GET", path, { query: { format: "event" } })).body.room_id;
        }

        /** The account's rooms, as GET /rooms lists them. */
        rooms() {
            if (!this.listed || Date.now() > this.listAgain) {
                this.listAgain = Date.now() + SHARED;
                this.listed = this.call("GET", "/rooms").then(({ body }) => {
                    this.decrypts = body.encrypted_rooms === "encrypt";
                    return body.rooms;
                });
            }
            return this.listed;
        }

        /** Looks at which rooms are encrypted. For those that become so later there is the stream; not for all keys. */
        async lookForEncryption() {
            clearTimeout(this.looking);
            let pause = LOOK;
            try {
                for (const room of await this.rooms()) if (room.encrypted) this.encrypted.add(room.room_id);
                this.tell(this.state);
            } catch {
                pause = LOOK_AGAIN; // what is heard is not worse for it
            }
            if (this.live) this.looking = setTimeout(() => this.lookForEncryption(), pause);
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
            const more = this.hearsEncryption ? [ENCRYPTION] : [];
            const types = wanted.some((each) => !each.length) ? "" : [...new Set([...wanted.flat(), ...more])].sort().join(",");
            if (this.live && this.listeners.size && types === this.live.query.types) return;
            const position = this.live ? this.live.position : positions.get(this.id) || this.context().get("position") || "";
            this.stopLive();
            if (!this.listeners.size) return;
            this.live = new Live(this.client, { query: { types }, position });
            this.live.on("open", () => {
                this.tell({ open: true, why: "" });
                this.lookForEncryption();
            });
            this.live.on("lost", (why, refused, status) => this.lose(why, refused, status));
            this.live.on("event", (event) => this.hear(event));
            this.live.start();
        }

        lose(why, refused, status) {
            if (status === 403 && this.hearsEncryption && this.live.query.types) {
                this.hearsEncryption = false; // the key may be for some event types only
                this.arrange();
            } else {
                this.tell({ open: false, why, refused });
            }
        }

        hear(event) {
            if (event.type === ENCRYPTION && event.state_key === "") {
                this.encrypted.add(event.room_id);
                this.tell(this.state);
            }
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
            clearTimeout(this.looking);
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
        rooms: async (client) => (await client.call("GET", "/rooms")).body,
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
            const { message, kind, values } = error; // the kind lets the editor say it in its own language
            response.json({ error: message, kind, values });
        } finally {
            if (client) client.close();
        }
    });
};

function clientOf(RED, node, config, credentials) {
    const words = wordsOf(RED, "flowbridge-server", "address");
    const url = evaluate(RED, node, config.url, config.urlType || "str");
    if (!url) {
        const kind = config.urlType === "env" ? "unset" : "empty";
        const values = { name: config.url || "FLOWBRIDGE_URL" };
        throw Object.assign(new InputError(words(kind, values)), { kind, values });
    }
    const tls = {};
    const tlsNode = config.tls && RED.nodes.getNode(config.tls);
    if (tlsNode) tlsNode.addTLSOptions(tls);
    const key = (credentials && credentials.key) || evaluate(RED, node, "FLOWBRIDGE_KEY", "env") || "";
    return new Client({ url: String(url), key: String(key).trim(), timeout: Number(config.timeout) || undefined, tls, words });
}

function typesOf({ body }) {
    return body.event_types.map(({ type, name, state }) => ({ type, name, state }));
}
