"use strict";
// Starts a flow for each event in the account's rooms.

const { segments } = require("./lib/client");
const { roomNamed, serverOf, show } = require("./lib/node");
const { evaluate } = require("./lib/values");

module.exports = function (RED) {
    class Listen {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.types = names(config.types);
            this.wanted = {
                types: this.types.map(pattern),
                msgtypes: names(config.msgtypes),
                senders: names(config.senders),
                own: Boolean(config.own),
                skipsEncrypted: Boolean(config.skipEncrypted),
            };
            try {
                this.server = serverOf(RED, config.server);
                const kind = config.roomType === "env" ? "env" : "str";
                const room = String(evaluate(RED, this, config.room || "", kind) || "").trim();
                this.room = room && roomNamed(room);
                this.stop = this.server.listen({
                    types: this.types,
                    event: (event) => this.hear(event),
                    state: (state) => this.tell(state),
                });
            } catch (error) {
                this.error(error.message);
                show(this, "error", error.message);
            }
            this.on("close", () => {
                this.closed = true;
                clearTimeout(this.again);
                if (this.stop) this.stop();
            });
        }

        /** Passes an event on, or keeps it until the room's id and our user id are known. */
        hear(event) {
            if (this.closed) return;
            if (this.knows) this.pass(event);
            else this.early = [...(this.early || []), event].slice(-MAX_EARLY);
        }

        pass(event) {
            const { types, msgtypes, senders, own, skipsEncrypted } = this.wanted;
            const encrypted = event.type === "m.room.encrypted";
            const content = event.content || {};
            const about = event.flowbridge || {};
            this.note(event, about);
            const fits =
                (!this.roomId || event.room_id === this.roomId) &&
                (!types.length || types.some((type) => type.test(event.type))) &&
                (!msgtypes.length || msgtypes.includes(content.msgtype)) &&
                (!senders.length || senders.includes(event.sender)) &&
                (own || event.sender !== this.userId) &&
                !(encrypted && skipsEncrypted);
            if (!fits) return;
            const { room_id: roomId, event_id: eventId, sender } = event;
            const msg = { topic: roomId, payload: content, event, roomId, eventId, sender };
            if (encrypted) msg.encrypted = true;
            else if (about.encrypted) msg.verified = about.verified === true;
            const url = this.fileOf(event);
            if (url) msg.url = url;
            this.send(msg);
        }

        /** Shows whether the newest encrypted event that was heard can be read. */
        note({ room_id: roomId }, { encrypted, undecryptable }) {
            if (!encrypted || (this.roomId && roomId !== this.roomId)) return;
            const unread = String(undecryptable || "");
            if (unread === (this.unread || "")) return;
            this.unread = unread;
            this.connect();
        }

        /** Where the bridge has the event's file, decrypted: for an HTTP request with the same key. */
        fileOf({ content, room_id, event_id }) {
            const { file, url } = content || {};
            const [, server, media] = MXC.exec(String((file && file.url) || url)) || [];
            if (!server) return undefined;
            const { client } = this.server;
            return client.base.origin + client.target(segments("media", server, media), file ? { room_id, event_id } : {});
        }

        tell({ open, why, refused }) {
            if (this.closed) return;
            if (open) {
                if (this.knows) this.connect();
                else this.learn();
                return;
            }
            if (!why) {
                show(this, "waiting", RED._("flowbridge-listen.status.connecting"));
                return;
            }
            show(this, "error", why);
            if (refused && this.said !== why) this.error(why); // for a passing failure, the status is enough
            this.said = why;
        }

        /** Shows that events come, and where they cannot be read. */
        connect() {
            const { encrypted, decrypts } = this.server;
            const status = (name, values) => RED._(`flowbridge-listen.status.${name}`, values);
            if (this.unread) {
                show(this, "waiting", status("unread", { reason: this.unread }));
            } else if (decrypts && (this.roomId ? encrypted.has(this.roomId) : encrypted.size)) {
                show(this, "connected", status("decrypts"));
            } else if (!this.roomId) {
                show(this, "connected", encrypted.size ? status("some", { number: encrypted.size }) : status("connected"));
            } else if (!encrypted.has(this.roomId)) {
                show(this, "connected", status("connected"));
            } else {
                show(this, "waiting", status("encrypted"));
                if (!this.warned) this.warn(RED._("flowbridge-listen.encrypted", { room: this.room }));
                this.warned = true;
            }
        }

        /** Finds out which room an alias names, and who we are. */
        async learn() {
            if (this.learning) return;
            this.learning = true;
            clearTimeout(this.again);
            try {
                if (this.room) this.roomId = await this.server.roomId(this.room);
                if (!this.wanted.own) this.userId = (await this.server.call("GET", "/whoami")).body.user_id;
            } catch (error) {
                if (this.closed) return;
                show(this, "error", error.message);
                if (this.said !== error.message) this.error(error.message);
                this.said = error.message;
                this.again = setTimeout(() => this.learn(), RETRY);
                return;
            } finally {
                this.learning = false;
            }
            if (this.closed) return;
            this.knows = true;
            this.said = "";
            this.connect();
            const early = this.early || [];
            this.early = [];
            for (const event of early) this.pass(event);
        }
    }

    RED.nodes.registerType("flowbridge listen", Listen);
};

const RETRY = 10_000; // ms
const MAX_EARLY = 1_000; // events
const MXC = /^mxc:\/\/([A-Za-z0-9[][A-Za-z0-9.:[\]-]*)\/([\w-]+)$/; // no `..`: the key goes to what is made of it

function names(text) {
    return String(text || "")
        .split(",")
        .map((name) => name.trim())
        .filter(Boolean);
}

/** `m.room.*` matches all types with that prefix. */
function pattern(type) {
    const literal = type.replace(/\*$/, "").replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    return new RegExp(`^${literal}${type.endsWith("*") ? "" : "$"}`);
}
