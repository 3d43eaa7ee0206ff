// The face that works from disk: each figure's packed view stands beside it in the page.
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
