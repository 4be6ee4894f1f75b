// Hover labels, the map's colouring and the neighbour table's filter. The page is readable without any of it.
(function () {
  "use strict";
  var tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);
  function show(event) {
    var mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) { return; }
    tip.textContent = mark.getAttribute("data-tip");
    var box = tip.getBoundingClientRect();
    var left = Math.min(event.clientX + 14, window.innerWidth - box.width - 6);
    var top = event.clientY + 18 + box.height > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 18;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, top) + "px";
  }
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.querySelectorAll(".map [data-tip] title").forEach(function (title) { title.remove(); });

  document.querySelectorAll(".map").forEach(function (map) {
    map.querySelectorAll("button[data-colour]").forEach(function (button) {
      button.addEventListener("click", function () {
        var key = button.getAttribute("data-colour");
        map.querySelectorAll("button[data-colour]").forEach(function (other) {
          other.setAttribute("aria-pressed", String(other === button));
        });
        map.querySelectorAll("[data-layer]").forEach(function (layer) {
          layer.style.display = layer.getAttribute("data-layer") === key ? "" : "none";
        });
        map.querySelectorAll("[data-legend]").forEach(function (legend) {
          legend.hidden = legend.getAttribute("data-legend") !== key;
        });
      });
    });
    map.querySelectorAll(".legend li").forEach(function (item) {
      function fade(on) {
        var name = item.textContent;
        map.querySelectorAll(".mark").forEach(function (mark) {
          mark.classList.toggle("faded", on && mark.getAttribute("data-group") !== name);
        });
      }
      item.addEventListener("pointerenter", function () { fade(true); });
      item.addEventListener("pointerleave", function () { fade(false); });
    });
  });

  document.querySelectorAll(".pictures img").forEach(function (picture) {
    picture.addEventListener("click", function () { picture.parentNode.classList.toggle("large"); });
  });

  document.querySelectorAll(".filter").forEach(function (filter) {
    var table = document.getElementById(filter.getAttribute("data-table"));
    var search = filter.querySelector("input");
    var wrongOnly = false;
    function apply() {
      var words = search.value.toLowerCase();
      table.querySelectorAll("tbody tr").forEach(function (row) {
        row.hidden = (wrongOnly && row.getAttribute("data-miss") !== "1") ||
          row.textContent.toLowerCase().indexOf(words) < 0;
      });
    }
    search.addEventListener("input", apply);
    filter.querySelectorAll("button").forEach(function (button) {
      button.addEventListener("click", function () {
        wrongOnly = button.getAttribute("data-show") === "miss";
        filter.querySelectorAll("button").forEach(function (other) {
          other.setAttribute("aria-pressed", String(other === button));
        });
        apply();
      });
    });
  });
}());
