// The widget in Jupyter: anywidget passes the model; its `frame` holds the packed view.
const copied = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

function render({ model, el }) {
  const stage = mount(el, decode(copied(model.get("frame"))), (message) => model.send(message));
  // A growing view: only the newest push per screen refresh is drawn, and no push older than the stored frame.
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
