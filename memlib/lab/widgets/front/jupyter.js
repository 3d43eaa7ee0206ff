// The live face: anywidget hands over the model whose `frame` holds the packed view.
const copied = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

function render({ model, el }) {
  const stage = mount(el, decode(copied(model.get("frame"))), (message) => model.send(message));
  // A view that grows while it is watched: only the newest push of a screen's refresh is drawn, and none
  // that came before a frame that is kept.
  let newest = null;
  const changed = () => {
    newest = null;
    stage.show(decode(copied(model.get("frame"))));
  };
  const heard = (message, buffers) => {
    if (message.type === "go") stage.go(message.change);
    if (message.type !== "push") return;
    const first = newest === null;
    newest = buffers[0];
    if (first) requestAnimationFrame(() => {
      const push = newest;
      newest = null;
      if (push) stage.show(decode(copied(push)));
    });
  };
  model.on("change:frame", changed);
  model.on("msg:custom", heard);
  return () => {
    model.off("change:frame", changed);
    model.off("msg:custom", heard);
    stage.free();
  };
}

export default { render };
