"use strict";
// The last file: ends what the others have started.

const world = require("./world");

after(world.close);
