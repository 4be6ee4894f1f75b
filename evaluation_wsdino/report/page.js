// Hover labels, the map's colouring and the neighbour table's filter. The page is readable without any of it.
(function () {
  "use strict";
  function all(root, selector) { return Array.from(root.querySelectorAll(selector)); }

  // Of a group of buttons, the one clicked is pressed; `chosen` is called with it.
  function choice(root, chosen) {
    all(root, "button").forEach(function (button) {
      button.addEventListener("click", function () {
        all(root, "button").forEach(function (other) { other.setAttribute("aria-pressed", String(other === button)); });
        chosen(button);
      });
    });
  }

  var tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  function show(event) {
    var mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) { return; }
    tip.textContent = mark.dataset.tip;
    var box = tip.getBoundingClientRect();
    var below = event.clientY + 18;
    var top = below + box.height > window.innerHeight ? event.clientY - box.height - 10 : below;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 6)) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  all(document, ".map [data-tip] title").forEach(function (title) { title.remove(); });

  all(document, ".map").forEach(function (map) {
    choice(map, function (button) {
      all(map, "[data-layer]").forEach(function (layer) {
        layer.style.display = layer.dataset.layer === button.dataset.colour ? "" : "none";
      });
      all(map, "[data-legend]").forEach(function (legend) {
        legend.hidden = legend.dataset.legend !== button.dataset.colour;
      });
    });
    all(map, ".legend li").forEach(function (item) {
      function fade(on) {
        all(map, ".mark").forEach(function (mark) {
          mark.classList.toggle("faded", on && mark.dataset.group !== item.dataset.group);
        });
      }
      item.addEventListener("pointerenter", function () { fade(true); });
      item.addEventListener("pointerleave", function () { fade(false); });
    });
  });

  all(document, ".pictures img").forEach(function (picture) {
    picture.addEventListener("click", function () { picture.parentNode.classList.toggle("large"); });
  });

  all(document, ".filter").forEach(function (filter) {
    var search = filter.querySelector("input"), missed = false;
    function apply() {
      all(document.getElementById(filter.dataset.table), "tbody tr").forEach(function (row) {
        row.hidden = (missed && row.dataset.miss === "0") ||
          row.textContent.toLowerCase().indexOf(search.value.toLowerCase()) < 0;
      });
    }
    search.addEventListener("input", apply);
    choice(filter, function (button) { missed = button.dataset.show === "miss"; apply(); });
  });
}());
