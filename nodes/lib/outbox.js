"use strict";
// Messages in flight to the bridge: in order within a room, retried while the bridge is down. Independent of Node-RED.

const { Lanes } = require("./lanes");

const FIRST_PAUSE = 500; // ms; doubled with each attempt that fails
const MAX_PAUSE = 10_000;
const MAX_WAITING = 10_000; // messages: they are in memory

class Outbox {
    /** `patience`: for how many ms a message is retried (0: a single attempt); `changed(waiting, trouble)` is called on each change. */
    constructor({ patience = 0, changed = () => {}, first = FIRST_PAUSE, most = MAX_WAITING } = {}) {
        this.patience = patience;
        this.changed = changed;
        this.first = first;
        this.lanes = new Lanes(most);
        this.closing = new AbortController(); // no more retries
        this.stopping = new AbortController(); // no more attempts
        this.trouble = "";
    }

    get waiting() {
        return this.lanes.size;
    }

    /**
     * Calls `attempt(signal)` once every earlier message of the room has ended, and resolves to its result. An error with
     * `passes` is retried until the patience is over. Rejects with the last error.
     */
    async send(room, attempt) {
        if (this.lanes.full) throw new Error(`${this.lanes.most} messages are waiting already: this one is not accepted`);
        const ends = Date.now() + this.patience;
        const running = this.lanes.run(room, () => this.retry(attempt, ends));
        this.changed(this.waiting, this.trouble);
        try {
            return await running;
        } finally {
            this.changed(this.waiting, this.trouble);
        }
    }

    async retry(attempt, ends) {
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

    /** Waits for some milliseconds, or until the outbox is closed. */
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

    /** Sends what can be sent now; gives up the rest after `patience` ms, or when the bridge is down. */
    async close(patience) {
        this.closing.abort();
        const timer = setTimeout(() => this.stopping.abort(), patience);
        await this.lanes.idle();
        clearTimeout(timer);
    }
}

module.exports = { Outbox };
