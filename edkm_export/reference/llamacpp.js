// Logits of llama.cpp for a GGUF file, through node-llama-cpp.
// Usage: node llamacpp.js REQUEST.json
// The request names the package folder and what to do; answers are written to the file that it names, because
// llama.cpp prints to the standard streams.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const {pathToFileURL} = require("node:url");

async function open(request) {
    const entry = path.join(request.package, "dist", "index.js");
    const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
    const llama = await getLlama({
        gpu: false,
        build: "never",
        skipDownload: true,
        usePrebuiltBinaries: true,
        progressLogs: false,
        maxThreads: 1, // its threads wait in loops: two of them on a busy machine are forty times slower than one
        logLevel: LlamaLogLevel.error
    });
    const model = await llama.loadModel({
        modelPath: request.model,
        gpuLayers: 0,
        ignoreMemorySafetyChecks: true,
        vocabOnly: request.task === "tokenize"
    });
    return model;
}

async function writeLogits(model, request) {
    const context = await model.createContext({
        contextSize: request.tokens.length + 8, // a full context is shifted before its last token is evaluated
        batchSize: Math.min(512, request.tokens.length),
        threads: 1,
        flashAttention: false,
        experimentalKvCacheKeyType: request.cache,
        experimentalKvCacheValueType: request.cache,
        swaFullCache: true,
        ignoreMemorySafetyChecks: true
    });
    const file = fs.openSync(request.answer, "w");
    try {
        const sequence = context.getSequence();
        // a part at a time: each position is a map of the whole vocabulary
        for (let start = 0; start < request.tokens.length; start += 32) {
            const part = request.tokens.slice(start, start + 32);
            const results = await sequence.controlledEvaluate(
                part.map((token) => [token, {generateNext: {logits: true}}])
            );
            for (const result of results) {
                const row = new Float32Array(result.next.logits.size);
                for (const [token, logit] of result.next.logits)
                    row[token] = logit;
                fs.writeSync(file, new Uint8Array(row.buffer));
            }
        }
    } finally {
        fs.closeSync(file);
    }
}

function writeTokens(model, request) {
    const tokens = request.texts.map((text) => model.tokenize(text, request.special));
    fs.writeFileSync(request.answer, JSON.stringify(tokens));
}

async function main() {
    const request = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
    const model = await open(request);
    if (request.task === "tokenize")
        writeTokens(model, request);
    else
        await writeLogits(model, request);
}

main().then(
    () => process.exit(0),
    (error) => {
        console.error(`error: ${error?.message ?? error}`);
        process.exit(1);
    }
);
