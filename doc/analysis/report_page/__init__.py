"""The page that report.py writes, and the figures of the same charts.

    run.py       a run's folder as numbers: columns, restarts, bins, files
    decks.py     a run's deck beside the shipped one
    samples.py   generated text, out of files or by `viaduct generate`
    attention.py attention weights that `viaduct eval` recorded
    chart.py     what a chart shows: series, axes, ticks; knows neither HTML nor matplotlib
    palette.py   colours, dashes and the steps of scales
    markup.py    HTML and SVG out of Python, with every string escaped
    svg.py       a chart as SVG in the page
    heat.py      tables and maps whose colours are the steps of a scale
    sections.py  the parts of the page
    figures.py   the same charts by matplotlib, as PNG and PDF
    page.css, page.js  are copied into the page
"""
