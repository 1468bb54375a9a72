"use strict";
// Creates, changes and reads rooms.

const { segments } = require("./lib/client");
const content = require("./lib/content");
const { InputError } = require("./lib/errors");
const { operationOf, serverOf, show, worker } = require("./lib/node");

module.exports = function (RED) {
    class Room {
        constructor(config) {
            RED.nodes.createNode(this, config);
            this.config = config;
            this.working = 0;
            this.signal = worker(this, (msg) => this.work(msg));
        }

        /** The properties that the message gets: `payload`, and perhaps `roomId`, `eventId`, `next`. */
        async work(msg) {
            const { config } = this;
            const server = serverOf(RED, config.server);
            server.usable();
            const { operation, room, typed, more } = await operationOf(RED, this, msg, OPERATIONS);
            const asked = config.valueType ? (await typed("value")).value : msg.payload;
            const ask = {
                room,
                asked,
                msg,
                limit: config.limit,
                call: (method, path, options) => server.call(method, path, { ...options, ...more }),
                upload: async (data, label) => (await server.usable().upload(data, { ...label, ...more })).content_uri,
            };
            this.working += 1;
            show(this, "sending", RED._("flowbridge-room.status.working"));
            try {
                const found = await operation.do(ask);
                this.working -= 1;
                if (!this.working && !more.signal.aborted) show(this, "connected", RED._("flowbridge-room.status.done"));
                return { roomId: room, ...found };
            } catch (error) {
                this.working -= 1;
                throw error;
            }
        }
    }

    RED.nodes.registerType("flowbridge room", Room);
};

const OPERATIONS = {
    create: { anywhere: true, do: create },
    invite: { do: (ask) => member(ask, "invite", { user_id: nameOf(ask.asked, "user_id", "the user to invite") }) },
    join: {
        do: async ({ call, room }) => {
            const { body } = await call("POST", segments("join", room), { body: {} });
            return { payload: body, roomId: body.room_id };
        },
    },
    leave: { do: (ask) => member(ask, "leave", {}) },
    name: { do: (ask) => state(ask, "m.room.name", { name: nameOf(ask.asked, "name", "the name", true) }) },
    topic: { do: (ask) => state(ask, "m.room.topic", { topic: nameOf(ask.asked, "topic", "the topic", true) }) },
    avatar: { do: async (ask) => state(ask, "m.room.avatar", await avatar(ask)) },
    pinned: { do: (ask) => state(ask, "m.room.pinned_events", { pinned: eventIds(ask.asked) }) },
    members: { do: members },
    history: { do: history },
    state: { do: readState },
};

async function create({ asked, call }) {
    const isName = typeof asked === "string" && asked.trim();
    const body = isName ? { name: asked.trim() } : asked && typeof asked === "object" && !Buffer.isBuffer(asked) ? asked : {};
    const found = (await call("POST", "/rooms", { body })).body;
    return { payload: found, roomId: found.room_id };
}

async function member({ room, call }, action, body) {
    return { payload: (await call("POST", segments("rooms", room, action), { body })).body };
}

async function state({ room, call }, type, body) {
    const found = (await call("PUT", segments("rooms", room, "state", type), { body })).body;
    return { payload: found, eventId: found.event_id };
}

async function avatar({ asked, msg, upload }) {
    if (Buffer.isBuffer(asked)) return { url: await upload(asked, content.label(asked, msg)) };
    const url = nameOf(asked, "url", "the avatar (a picture in a Buffer, or an mxc:// address)", true);
    return url ? { url } : {};
}

/** The room's members: a list of user_id, displayname, avatar_url. */
async function members({ room, call }) {
    const { body } = await call("GET", segments("rooms", room, "members"), { query: { membership: "join" } });
    const payload = body.chunk.map(({ state_key: user, content: { displayname, avatar_url: avatarUrl } = {} }) => ({
        user_id: user,
        displayname: displayname || null,
        avatar_url: avatarUrl || null,
    }));
    return { payload };
}

/** Events, newest first; `msg.next` is the start of the next page, to be passed as `msg.from`. */
async function history({ room, call, msg, limit }) {
    const query = { limit: msg.limit ?? limit, from: msg.from };
    const { body } = await call("GET", segments("rooms", room, "messages"), { query });
    return { payload: body.chunk, next: body.end };
}

/** All state; with an event type (and `msg.stateKey`) the content of that one. */
async function readState({ room, call, asked, msg }) {
    const type = typeof asked === "string" ? asked.trim() : "";
    const key = typeof msg.stateKey === "string" ? [msg.stateKey] : [];
    const path = type ? segments("rooms", room, "state", type, ...key) : segments("rooms", room, "state");
    return { payload: (await call("GET", path)).body };
}

/** A text, or the text under `name` of an object. */
function nameOf(asked, name, what, mayBeEmpty = false) {
    const found = asked && typeof asked === "object" && !Array.isArray(asked) ? asked[name] : asked;
    const text = typeof found === "number" ? String(found) : found;
    if (typeof text !== "string" || (!mayBeEmpty && !text.trim())) {
        throw new InputError(`${what} is missing: the value is a string, or an object with ${name}`, `/${name}`);
    }
    return text;
}

function eventIds(asked) {
    const found = asked && typeof asked === "object" && !Array.isArray(asked) ? asked.pinned : asked;
    const ids = Array.isArray(found) ? found : found ? [found] : [];
    if (!ids.every((id) => typeof id === "string")) throw new InputError("event ids are strings", "/pinned");
    return ids;
}
