"use strict";
// The bridge's address as people write it, and what is wrong with it. Pure.

const { InputError } = require("./errors");

/** The URL of a bridge. Throws InputError, with the sentence of `words`. */
function baseOf(url, words) {
    const text = String(url).trim();
    const wrong = (kind, values) => Object.assign(new InputError(words(kind, values)), { kind, values });
    if (/\s/.test(text)) throw wrong("space", { url: text });
    if (!/^[a-z][a-z0-9+.-]*:\/\//i.test(text)) {
        // host:port is a URL, too: its scheme would be `host`.
        const [, scheme = "http", host] = /^(?:(https?):?\/+)?\/*([\w.[\]:-]+(?:\/.*)?)$/i.exec(text) || [];
        throw host ? wrong("noScheme", { url: text, better: `${scheme}://${host}` }) : wrong("notAUrl", { url: text });
    }
    let base;
    try {
        base = new URL(text);
    } catch {
        throw wrong("notAUrl", { url: text });
    }
    if (!["http:", "https:"].includes(base.protocol)) throw wrong("scheme", { scheme: base.protocol });
    if (base.username || base.search || base.hash) throw wrong("more", {});
    const [before, below] = base.pathname.split(/\/_matrix\b/);
    if (below !== undefined) throw wrong("path", { path: `/_matrix${below}`, better: base.origin + before });
    base.port = base.port || (base.protocol === "https:" ? 443 : 80);
    return base;
}

/** Whether a handshake failed since the other side speaks plain http. */
function isWrongProtocol(error) {
    return /^ERR_SSL_(WRONG_VERSION_NUMBER|PACKET_LENGTH_TOO_LONG|HTTP_REQUEST)$/.test(error.code) || /wrong version number/.test(error.message);
}

/** Whether a certificate is not of an authority that this machine trusts, or not for this name. */
function isUntrusted(error) {
    return /CERT|UNABLE_TO_VERIFY_LEAF_SIGNATURE/.test(error.code);
}

module.exports = { baseOf, isUntrusted, isWrongProtocol };
