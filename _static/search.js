/* The search page: excerpts show prose, without toolbars, code, formulas in TeX and what is folded. */
(function () {
  "use strict";
  if (typeof Search === "undefined" || !Search.htmlToText) return;
  const whole = Search.htmlToText;
  const unread = [
    ".bd-header-article",
    "#jb-print-docs-body",
    ".bd-footer-article",
    ".prev-next-footer",
    ".math",
    "math",
    "details",
    "noscript",
    ".cell_input",
    ".bn-begin",
    ".bn-explorable",
    "svg",
  ].join(",");
  Search.htmlToText = function (source, anchor) {
    const page = new DOMParser().parseFromString(source, "text/html");
    page.querySelectorAll(unread).forEach((element) => element.remove());
    const text = whole(page.documentElement.outerHTML, anchor);
    return text.replace(/\s+/g, " ").replace(/\s+([.,;:)])/g, "$1");
  };
})();
