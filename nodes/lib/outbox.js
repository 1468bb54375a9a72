"use strict";
// What is on its way to the bridge: in order within a room, tried again while the bridge is away. Knows nothing of Node-RED.

const { Lanes } = require("./lanes");

const FIRST_PAUSE = 500; // ms; doubled with each attempt that fails
const MAX_PAUSE = 10_000;
const MAX_WAITING = 10_000; // messages: they are in memory

class Outbox {
    /** `patience`: for how many ms a message is tried again (0: once); `changed(waiting, trouble)` is told of it. */
    constructor({ patience = 0, changed = () => {}, first = FIRST_PAUSE, most = MAX_WAITING } = {}) {
        this.patience = patience;
        this.changed = changed;
        this.first = first;
        this.lanes = new Lanes(most);
        this.closing = new AbortController(); // nothing is tried again
        this.stopping = new AbortController(); // nothing is sent any more
        this.trouble = "";
    }

    get waiting() {
        return this.lanes.size;
    }

    /**
     * Calls `attempt(signal)`, once all before it in the room have ended; resolves to what it resolves to. An error with
     * `passes` is tried again until the patience is over. Rejects with the last error.
     */
    async send(room, attempt) {
        if (this.lanes.full) throw new Error(`${this.lanes.most} messages wait already: this one is not taken`);
        const ends = Date.now() + this.patience;
        const running = this.lanes.run(room, () => this.insist(attempt, ends));
        this.changed(this.waiting, this.trouble);
        try {
            return await running;
        } finally {
            this.changed(this.waiting, this.trouble);
        }
    }

    async insist(attempt, ends) {
        for (let pause = this.first; ; pause = Math.min(pause * 2, MAX_PAUSE)) {
            if (this.stopping.signal.aborted) throw new Error("the flow was stopped before this message was sent");
            try {
                const found = await attempt(this.stopping.signal);
                this.trouble = "";
                return found;
            } catch (error) {
                const next = Math.max(pause, error.retryAfter || 0);
                if (!error.passes || this.closing.signal.aborted || Date.now() + next > ends) {
                    this.trouble = "";
                    throw error;
                }
                this.trouble = error.message;
                this.changed(this.waiting, this.trouble);
                await this.rest(next);
            }
        }
    }

    /** Some milliseconds, or until it is closed. */
    rest(pause) {
        return new Promise((resolve) => {
            const over = () => {
                clearTimeout(timer);
                this.closing.signal.removeEventListener("abort", over);
                resolve();
            };
            const timer = setTimeout(over, pause);
            this.closing.signal.addEventListener("abort", over);
        });
    }

    /** What can be sent now is sent; after `patience` ms, or when the bridge is away, the rest is given up. */
    async close(patience) {
        this.closing.abort();
        const timer = setTimeout(() => this.stopping.abort(), patience);
        await this.lanes.idle();
        clearTimeout(timer);
    }
}

module.exports = { Outbox };
