// Views in an HTML file: each script element holds one packed view.
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

for (const packed of document.querySelectorAll("script[data-memlib]")) {
  const root = document.createElement("div");
  packed.after(root);
  inflate(packed.textContent.trim()).then((buffer) => mount(root, decode(buffer)));
}
