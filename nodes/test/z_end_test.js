"use strict";
// The last file: ends what the others have started.

const nodeRed = require("./node_red");
const world = require("./world");

after(async () => {
    await nodeRed.close();
    await world.close();
});
