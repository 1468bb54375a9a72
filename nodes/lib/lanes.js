"use strict";
// Work that keeps its order: one after another in a lane, lanes side by side.

class Lanes {
    /** `most`: how much may wait, in all lanes together. */
    constructor(most) {
        this.most = most;
        this.size = 0;
        this.last = new Map();
    }

    /** Whether no more is taken. */
    get full() {
        return this.size >= this.most;
    }

    /** Does `work` when all that was given for the lane before has ended, however it ended; resolves when it has. */
    run(lane, work) {
        this.size += 1;
        const before = this.last.get(lane) || Promise.resolve();
        const done = before.then(work).finally(() => {
            this.size -= 1;
            if (this.last.get(lane) === done) this.last.delete(lane);
        });
        this.last.set(lane, done);
        return done;
    }

    /** When all that waits has ended. */
    async idle() {
        while (this.size) await Promise.allSettled(this.last.values());
    }
}

module.exports = { Lanes };
