/** Files that esbuild's `binary` loader turns into bytes. */
declare module '*.wasm' {
  const bytes: Uint8Array;
  export default bytes;
}
declare module '*.woff2' {
  const bytes: Uint8Array;
  export default bytes;
}
