"use strict";
// Figures of the nodes, as one line of JSON on stdout; `make bench` runs it. What it does it says on stderr.

const fs = require("node:fs");

const { load, unload } = require("./flow");
const nodeRed = require("./node_red");
const world = require("./world");

const MESSAGES = 1_000;
const WARM_UP = 50;
const AWAY = 10_000; // ms that the bridge is dead
const CALLS = 100; // of each way, in turns
const PATIENCE = 120_000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const say = (text) => process.stderr.write(`  ${text}\n`);
const median = (times) => [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)];

async function main() {
    const figures = { ...(await queued()), ...(await latency()) };
    await world.close();
    process.stdout.write(`${JSON.stringify(figures)}\n`);
}

/** A flow that is given all messages at once, in a Node-RED of its own; the bridge dies in the middle. */
async function queued() {
    const red = await nodeRed.open();
    const { room } = red;
    try {
        await red.deploy(flow());
        await world.until(() => press(red, "warm")); // the flow starts after the deployment has been answered
        await arrived(room, WARM_UP);
        const before = memory(red.pid);
        let most = before;
        const watching = setInterval(() => (most = Math.max(most, memory(red.pid))), 100);
        const began = Date.now();
        await press(red, "all");
        await pause(500);
        await world.bridge("kill");
        const accepted = (await world.messages(room)).length - WARM_UP;
        say(`${MESSAGES} messages at once; the bridge is killed when ${accepted} are in the room, for ${AWAY / 1000} s`);
        await pause(AWAY);
        await world.bridge("start");
        await arrived(room, WARM_UP + MESSAGES);
        clearInterval(watching);
        const seconds = (Date.now() - began) / 1000;
        const numbers = (await world.messages(room)).slice(WARM_UP).map((event) => Number(event.content.body));
        return {
            messages: MESSAGES,
            seconds,
            lost: MESSAGES - new Set(numbers).size,
            doubled: numbers.length - new Set(numbers).size,
            outOfOrder: numbers.filter((number, at) => at && number < numbers[at - 1]).length,
            memoryMb: most - before,
        };
    } finally {
        await nodeRed.close();
    }
}

async function press(red, id) {
    return (await fetch(`${red.url}/inject/${id}`, { method: "POST" })).ok;
}

function flow() {
    const inject = (id, many) => [
        { id, type: "inject", z: "tab", x: 1, y: 1, props: [{ p: "payload" }], payload: many, payloadType: "num", wires: [["many"]] },
    ];
    const code = "for (let number = 0; number < msg.payload; number += 1) node.send({ payload: number });";
    return [
        { id: "tab", type: "tab", label: "figures" },
        { id: "bridge", type: "flowbridge-server", url: "FLOWBRIDGE_URL", urlType: "env", timeout: 30 },
        ...inject("warm", WARM_UP),
        ...inject("all", MESSAGES),
        { id: "many", type: "function", z: "tab", x: 1, y: 1, func: code, outputs: 1, wires: [["send"]] },
        { id: "send", type: "flowbridge send", z: "tab", x: 1, y: 1, server: "bridge", room: "ROOM", roomType: "env", payload: "payload", payloadType: "msg", mode: "queue", patience: 5, wires: [[]] },
    ];
}

async function arrived(room, wanted) {
    const ends = Date.now() + PATIENCE;
    while ((await world.messages(room)).length < wanted) {
        if (Date.now() > ends) throw new Error(`only ${(await world.messages(room)).length} of ${wanted} messages came`);
        await pause(500);
    }
}

/** MB of a process. */
function memory(pid) {
    return Number(/VmRSS:\s+(\d+)/.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))[1]) / 1024;
}

/** From a message to its event id: the send node, and a bare http request node that makes the same call. */
async function latency() {
    const facts = await world.open();
    const room = await world.room();
    const url = `${facts.bridge}/rooms/${encodeURIComponent(room)}/send/m.room.message`;
    const { ask } = await load(
        [
            { id: "send", type: "flowbridge send", room },
            { id: "http", type: "http request", method: "POST", url, ret: "obj", authType: "bearer" },
        ],
        { more: [require("@node-red/nodes/core/network/21-httprequest.js")], credentials: { http: { password: facts.key } } },
    );
    const times = { send: [], http: [] };
    for (let number = 0; number < CALLS + 10; number += 1) {
        for (const id of ["send", "http"]) {
            const began = performance.now();
            const { msg, error } = await ask({ payload: { msgtype: "m.text", body: `${id} ${number}` } }, id);
            if (error || !msg.payload.event_id) throw error || new Error(JSON.stringify(msg.payload));
            if (number >= 10) times[id].push(performance.now() - began);
        }
    }
    await unload();
    const [ours, bare] = [median(times.send), median(times.http)];
    say(`to an event id: ${ours.toFixed(1)} ms, with a bare http request node ${bare.toFixed(1)} ms`);
    return { sendMs: ours, httpMs: bare };
}

main().then(
    () => process.exit(),
    (error) => {
        process.stderr.write(`${error.stack}\n`);
        process.exit(1);
    },
);
