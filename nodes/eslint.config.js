"use strict";

const js = require("@eslint/js");
const html = require("eslint-plugin-html");
const globals = require("globals");

/** What runs in the editor's page: Node-RED's own names beside the browser's. */
const page = { ...globals.browser, $: "readonly", RED: "readonly" };

module.exports = [
    js.configs.recommended,
    {
        languageOptions: { sourceType: "commonjs", globals: globals.node },
        linterOptions: { reportUnusedDisableDirectives: "error" },
        rules: {
            "array-callback-return": "error",
            eqeqeq: "error",
            "no-else-return": "error",
            "no-shadow": "error",
            "no-throw-literal": "error",
            "no-unused-expressions": "error",
            "no-var": "error",
            "object-shorthand": "error",
            "prefer-const": "error",
            "prefer-template": "error",
            strict: "error",
        },
    },
    {
        files: ["*.html"],
        plugins: { html },
        languageOptions: { sourceType: "script", globals: page },
        rules: { strict: "off" }, // it would need a function around each script
    },
    { files: ["test/**"], languageOptions: { globals: { ...globals.mocha, ...page } } },
];
