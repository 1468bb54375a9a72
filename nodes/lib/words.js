"use strict";
// Sentences in English, from the same file as those that Node-RED shows. Independent of Node-RED.

/** What says a sentence of a node's file by its name under `group`; `values` fill its `__names__`. */
function english(node, group) {
    const texts = require(`../locales/en-US/${node}.json`)[node][group];
    return (name, values = {}) => texts[name].replace(/__(\w+)__/g, (_, each) => values[each]);
}

module.exports = { english };
