"use strict";
// A real homeserver with a bridge in front of it, for all tests of one mocha run (tests/world.py).

const { spawn } = require("node:child_process");
const { existsSync } = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");

const ROOT = process.env.FLOWBRIDGE_ROOT || path.resolve(__dirname, "../..");
const PYTHON = process.env.FLOWBRIDGE_PYTHON || path.join(ROOT, ".venv/bin/python");

let world;

/** Starts it, once. Resolves to `{homeserver, bridge, bot, friend, key}`; accounts are `{user_id, access_token, …}`. */
async function open() {
    if (world) return world.facts;
    if (!existsSync(PYTHON)) throw new Error(`${PYTHON} is not there: run make install first`);
    const child = spawn(PYTHON, ["-m", "tests.world"], { cwd: ROOT, stdio: ["pipe", "pipe", "inherit"] });
    const lines = readline.createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const next = async () => {
        const { value, done } = await lines.next();
        if (done) throw new Error("tests.world ended");
        return JSON.parse(value);
    };
    world = { child, next };
    world.facts = await next();
    return world.facts;
}

/** Where everything is, once it is open. */
const facts = () => world.facts;

/** `kill` ends the bridge as kill -9 does, `start` starts it again at the same URL, with the same store. */
async function bridge(command) {
    world.child.stdin.write(`${command}\n`);
    await world.next();
    world.away = command === "kill";
}

/** After a test that may have failed while the bridge was away. */
async function mend() {
    if (world && world.away) await bridge("start");
}

/** Ends all of it. */
async function close() {
    if (!world) return;
    const ended = new Promise((resolve) => world.child.once("exit", resolve));
    world.child.stdin.end();
    await ended;
    world = undefined;
}

/** A call to the homeserver itself, as an account; the JSON of its answer. */
async function matrix(account, method, target, body, version = "v3") {
    const answer = await fetch(`${world.facts.homeserver}/_matrix/client/${version}${target}`, {
        method,
        headers: { Authorization: `Bearer ${account.access_token}` },
        body: body === undefined ? undefined : JSON.stringify(body),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(`${method} ${target}: ${answer.status} ${JSON.stringify(found)}`);
    return found;
}

/** A new room of the bot's; its id. */
async function room(settings = {}) {
    return (await matrix(world.facts.bot, "POST", "/createRoom", settings)).room_id;
}

/** The messages in a room, the oldest first, as the homeserver has them. */
async function messages(roomId) {
    const found = [];
    for (let from = ""; ; ) {
        const target = `/rooms/${encodeURIComponent(roomId)}/messages?dir=f&limit=500${from && `&from=${encodeURIComponent(from)}`}`;
        const page = await matrix(world.facts.bot, "GET", target);
        found.push(...page.chunk.filter((event) => event.type === "m.room.message"));
        if (!page.end || !page.chunk.length) return found;
        from = page.end;
    }
}

/**
 * Until `look` resolves to something true, which is the result; fails after so many milliseconds: many, since a wait
 * ends with what is waited for, and a test must not depend on how busy the machine is.
 */
async function until(look, patience = 60_000) {
    const ends = Date.now() + patience;
    for (;;) {
        const found = await look();
        if (found) return found;
        if (Date.now() > ends) throw new Error(`nothing came of it: ${look}`);
        await new Promise((resolve) => setTimeout(resolve, 100)); // a look costs the homeserver 10 ms of the processor
    }
}

module.exports = { ROOT, facts, open, bridge, mend, close, matrix, room, messages, until };
