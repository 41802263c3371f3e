// Runs a test program. It can print nothing; where it fails it traps, and the stack names the test.
import { readFileSync } from "node:fs";

const module = new WebAssembly.Module(readFileSync(process.argv[2]));
// What `wasm-bindgen` would provide. Nothing here needs it.
const imports = {};
for (const { module: from, name } of WebAssembly.Module.imports(module)) {
    imports[from] ??= {};
    imports[from][name] = () => {
        throw new Error(`${name} is called`);
    };
}
const start = performance.now();
const { main } = new WebAssembly.Instance(module, imports).exports;
process.exitCode = main(0, 0);
console.log(`exit status ${process.exitCode}, after ${Math.round(performance.now() - start)} ms`);
