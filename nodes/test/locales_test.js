"use strict";
// Every text of a dialog or a help exists in every language.

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");

const FOLDER = path.resolve(__dirname, "../locales");
const STANDARD = "en-US";

const read = (language, file) => fs.readFileSync(path.join(FOLDER, language, file), "utf8");
const keys = (value, at = "") =>
    typeof value === "string" ? [at] : Object.entries(value).flatMap(([key, each]) => keys(each, `${at}/${key}`));
const variables = (text) => (text.match(/__\w+__/g) || []).sort();
/** What a help is made of, whatever its words: its tags, and its properties as flows name them. */
const structure = (help) => ({
    tags: help.match(/<\/?(?:script|p|h3|dl|dt|dd|ul|li)\b/g),
    properties: [...help.matchAll(/<dt[^>]*>([a-z][\w, ]*) </g)].map(([, name]) => name),
    types: [...help.matchAll(/property-type">([^<]*)</g)].map(([, type]) => type),
});

describe("the languages", () => {
    const languages = fs.readdirSync(FOLDER).filter((each) => each !== STANDARD);

    it("include German", () => assert.deepEqual(languages, ["de"]));

    for (const language of languages) {
        it(`have the same files as English: ${language}`, () => {
            assert.deepEqual(fs.readdirSync(path.join(FOLDER, language)), fs.readdirSync(path.join(FOLDER, STANDARD)));
        });
        for (const file of fs.readdirSync(path.join(FOLDER, STANDARD))) {
            it(`have the same texts as English: ${language}/${file}`, () => {
                const [ours, theirs] = [read(STANDARD, file), read(language, file)];
                if (!file.endsWith(".json")) return assert.deepEqual(structure(theirs), structure(ours));
                const [english, other] = [JSON.parse(ours), JSON.parse(theirs)];
                assert.deepEqual(keys(other), keys(english));
                for (const key of keys(english)) {
                    const at = (value) => key.split("/").slice(1).reduce((found, part) => found[part], value);
                    assert.ok(at(other).trim(), key);
                    assert.deepEqual(variables(at(other)), variables(at(english)), key);
                }
            });
        }
    }
});
