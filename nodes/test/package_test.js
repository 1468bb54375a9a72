"use strict";
// What node-red-dev 0.1.6 checks (P01 … D03), as far as that needs no network. The tool itself stops without one: it asks
// for the catalogue and the registry on every run; and it never fails for P05 (it notes `test: true` either way).

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");

const semver = require("semver");

const PACKAGE = path.resolve(__dirname, "..");
const manifest = require("../package.json");
const nodeRed = require("node-red/package.json");

const text = (name) => fs.readFileSync(path.join(PACKAGE, name), "utf8");
const examples = () => fs.readdirSync(path.join(PACKAGE, "examples")).flatMap((file) => JSON.parse(text(`examples/${file}`)));
/** The types that an HTML file registers, as literals: all that the catalogue's tools can read. */
const registered = (file) => [...text(file).matchAll(/RED\.nodes\.registerType\("([^"]+)", \{\s*category: "([^"]+)"/g)].map(([, type, category]) => ({ type, category }));

describe("the package, by node-red-dev's rules", () => {
    it("P01: has a licence, and its text", () => {
        assert.equal(manifest.license, "Apache-2.0");
        assert.match(text("LICENSE"), /Apache License\s+Version 2\.0/);
    });

    it("P03: says where its source is, and where bugs go", () => {
        assert.match(manifest.repository.url, /^git\+https:\/\/.+\.git$/);
        assert.equal(manifest.repository.directory, path.basename(PACKAGE));
        assert.match(manifest.bugs.url ?? manifest.bugs, /^https:\/\//);
    });

    it("P04: has a scoped name", () => assert.match(manifest.name, /^@[a-z\d][\w.-]+\/[a-z\d][\w.-]*$/));

    it("P05: is found by the keyword node-red", () => assert.ok(manifest.keywords.includes("node-red")));

    it("P06: is for the Node-RED that its tests run in", () => assert.ok(semver.satisfies(nodeRed.version, manifest["node-red"].version)));

    it("P07: runs on the oldest Node.js that this Node-RED runs on", () => {
        assert.ok(semver.satisfies(semver.minVersion(nodeRed.engines.node), manifest.engines.node));
    });

    it("N01: has types of its own name", () => {
        for (const [name, file] of Object.entries(manifest["node-red"].nodes)) {
            const [found, ...others] = registered(file.replace(/\.js$/, ".html"));
            assert.equal(others.length, 0);
            assert.equal(found.type.replace(" ", "-"), name);
            assert.match(found.type, /^flowbridge[ -]/);
            assert.equal(found.category, name === "flowbridge-server" ? "config" : "flowbridge");
        }
    });

    it("N02: has an example for each node", () => {
        const used = new Set(examples().map(({ type }) => type));
        const nodes = Object.values(manifest["node-red"].nodes).flatMap((file) => registered(file.replace(/\.js$/, ".html")));
        for (const { type, category } of nodes) assert.ok(category === "config" || used.has(type), type);
    });

    it("D01 to D03: needs no other package", () => {
        assert.deepEqual([manifest.dependencies, manifest.optionalDependencies, manifest.peerDependencies], [undefined, undefined, undefined]);
    });

    it("holds every file that its README shows or names", () => {
        const shown = [...text("README.md").matchAll(/\]\((?!https?:)([^)]+)\)/g)].map(([, file]) => file);
        assert.ok(shown.length);
        for (const file of shown) {
            assert.ok(fs.existsSync(path.join(PACKAGE, file)), file);
            assert.ok(manifest.files.some((each) => file.startsWith(each)), `${file} is not in the tarball`);
        }
    });
});
