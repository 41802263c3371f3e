// Runs a WebAssembly test program. The program cannot print. A failing test traps, and the stack
// trace names it.
import { readFileSync } from "node:fs";

const module = new WebAssembly.Module(readFileSync(process.argv[2]));
// `wasm-bindgen` would provide these imports. The tests call none of them.
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
