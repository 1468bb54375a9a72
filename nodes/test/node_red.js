"use strict";
// A real Node-RED, the one that package.json pins, with this package installed as a user installs it.

const { execFile, spawn } = require("node:child_process");
const fs = require("node:fs/promises");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");
const { promisify } = require("node:util");

const world = require("./world");

const PACKAGE = path.resolve(__dirname, "..");
const RED = path.join(path.dirname(require.resolve("node-red/package.json")), "red.js");
const START_PATIENCE = 120_000;
const STOP_PATIENCE = 60_000;

const SETTINGS = {
    uiHost: "127.0.0.1",
    flowFile: "flows.json",
    credentialSecret: "of-the-tests",
    telemetry: { enabled: false, updateNotification: false },
    externalModules: { autoInstall: false, palette: { allowInstall: false }, modules: { allowInstall: false } },
    editorTheme: { tours: false, projects: { enabled: false } },
    logging: { console: { level: "info", metrics: false, audit: false } },
};

let shared;

/** The one that all tests of a mocha run share, once it runs. Its flows find the bridge, the bot and the new `room`. */
async function open() {
    if (shared) return shared;
    const { bridge, key, bot } = await world.open();
    const room = await world.room();
    const environment = {
        FLOWBRIDGE_URL: bridge,
        FLOWBRIDGE_KEY: key,
        BASE_URL: bridge,
        ACCESS_TOKEN: bot.access_token,
        ROOM: room,
    };
    shared = { ...(await start(environment)), room };
    return shared;
}

/** Ends that one. */
async function close() {
    await shared?.stop();
    shared = undefined;
}

/**
 * Starts it. `environment` is what its flows see: nothing of the test's own environment but what any program needs.
 * Resolves to `{url, pid, deploy(flows), log(), errors(from), stop()}`; `from` is so many characters into the log.
 */
async function start(environment = {}) {
    const folder = await fs.mkdtemp(path.join(os.tmpdir(), "node-red-"));
    let running;
    try {
        await fs.writeFile(path.join(folder, "settings.js"), `module.exports = ${JSON.stringify(SETTINGS)};\n`);
        await install(folder);
        running = run(folder, await freePort(), environment);
        await world.until(() => answers(running), START_PATIENCE);
    } catch (error) {
        if (running) await running.stop();
        await fs.rm(folder, { recursive: true, force: true });
        throw error;
    }
    return {
        url: running.url,
        pid: running.child.pid,
        log: running.log,
        errors: (from = 0) => errorsIn(running.log().slice(from)),
        deploy: (flows) => deploy(running.url, flows),
        async stop() {
            await running.stop();
            await fs.rm(folder, { recursive: true, force: true });
        },
    };
}

/** This package into a user directory: packed and installed, so that a file missing from `files` is missed here. */
async function install(folder) {
    const npm = async (cwd, ...command) => {
        const quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"];
        return (await promisify(execFile)("npm", [...command, ...quiet], { cwd, timeout: 600_000 })).stdout;
    };
    await fs.writeFile(path.join(folder, "package.json"), '{"name": "node-red-project", "private": true}\n');
    await npm(PACKAGE, "pack", "--pack-destination", folder);
    const archive = (await fs.readdir(folder)).find((name) => name.endsWith(".tgz"));
    await npm(folder, "install", "--prefer-offline", `./${archive}`);
}

function run(folder, port, environment) {
    const { PATH, TMPDIR } = process.env;
    const command = [RED, "-u", folder, "-s", path.join(folder, "settings.js"), "-p", String(port)];
    const child = spawn(process.execPath, command, {
        cwd: folder,
        env: { PATH, ...(TMPDIR && { TMPDIR }), HOME: folder, ...environment },
        stdio: ["ignore", "pipe", "pipe"],
    });
    let log = "";
    for (const stream of [child.stdout, child.stderr]) {
        stream.setEncoding("utf8").on("data", (text) => (log += text));
    }
    const ended = new Promise((resolve) => child.once("close", resolve));
    const kill = () => child.kill("SIGKILL");
    process.once("exit", kill); // a test run that breaks off leaves nothing behind
    return {
        child,
        url: `http://127.0.0.1:${port}`,
        log: () => log,
        async stop() {
            const last = setTimeout(kill, STOP_PATIENCE);
            child.kill();
            await ended;
            clearTimeout(last);
            process.removeListener("exit", kill);
        },
    };
}

/** Whether it serves its editor: red.js listens only when the runtime has started. */
async function answers({ child, url, log }) {
    if (child.exitCode !== null) throw new Error(`Node-RED ended:\n${log()}`);
    try {
        return (await fetch(`${url}/flows`)).ok;
    } catch {
        return false;
    }
}

/** These flows, and no others, by the admin API; resolves when they run. */
async function deploy(url, flows) {
    const answer = await fetch(`${url}/flows`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "Node-RED-API-Version": "v2" },
        body: JSON.stringify({ flows }),
    });
    if (!answer.ok) throw new Error(`POST /flows: ${answer.status} ${await answer.text()}`);
    return answer.json();
}

/** The lines of a log that say that something went wrong: an error that a Catch node handles is not logged. */
function errorsIn(log) {
    const wrong = /\[(error|fatal)\]|uncaught|unhandled|waiting for missing types/i;
    return log.split("\n").filter((line) => wrong.test(line));
}

/** A port that stays free until Node-RED takes it: below those that systems give to outgoing connections. */
async function freePort() {
    for (;;) {
        const port = 18_000 + Math.floor(Math.random() * 14_000);
        const server = net.createServer();
        const free = await new Promise((resolve) => {
            server.once("error", () => resolve(false)).listen(port, "127.0.0.1", () => resolve(true));
        });
        if (!free) continue;
        await new Promise((resolve) => server.close(resolve));
        return port;
    }
}

module.exports = { open, close };
