/* On every page: what scrolls sideways can be reached and scrolled by keyboard. */
(function () {
  "use strict";
  const scrollers = "div.math, span.math, .bn-scroll, .text_html, article table, article pre, dt.sig";

  function reach() {
    for (const element of document.querySelectorAll(scrollers)) {
      const moves = ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
      if (moves && element.scrollWidth > element.clientWidth) {
        element.tabIndex = 0;
        if (element.tagName !== "TABLE" && !element.hasAttribute("role")) {
          element.setAttribute("role", "region");
          element.setAttribute("aria-label", "wider than the page, scrolls sideways");
        }
      }
    }
  }

  window.addEventListener("load", async function () {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    reach();
    window.addEventListener("resize", reach);
    await document.fonts.ready; // formulas change their width with their fonts
    reach();
  });
})();
