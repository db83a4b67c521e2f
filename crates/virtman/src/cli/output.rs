//! What commands print: tables for people, JSON for programs, progress bars only on a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// A table with a header; columns as wide as their content, numbers to the right.
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

/// How a column is set.
#[derive(Debug, Clone, Copy)]
pub(super) enum Column {
    /// Text, to the left.
    Text(&'static str),
    /// A number, to the right.
    Number(&'static str),
}

impl Table {
    pub(super) fn new(columns: impl Into<Vec<Column>>) -> Table {
        Table { columns: columns.into(), rows: Vec::new() }
    }

    /// Adds a row; it has a cell for each column.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let row: Vec<String> = cells.into_iter().collect();
        debug_assert_eq!(row.len(), self.columns.len(), "a row has a cell for each column");
        self.rows.push(row);
    }

    /// The table as text, without trailing blanks.
    pub(super) fn render(&self) -> String {
        let title = |column: &Column| match column {
            Column::Text(title) | Column::Number(title) => (*title).to_owned(),
        };
        let header: Vec<String> = self.columns.iter().map(title).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let width = |i: usize| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = String::new();
        for line in lines {
            let cells =
                line.iter().zip(&widths).zip(&self.columns).map(|((cell, &width), column)| match column {
                    Column::Text(_) => format!("{cell:<width$}"),
                    Column::Number(_) => format!("{cell:>width$}"),
                });
            let cells: Vec<String> = cells.collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// Prints the table, or `empty` if it has no rows.
    pub(super) fn print_or(&self, empty: &str) {
        if self.rows.is_empty() {
            say(empty);
        } else {
            print(&self.render());
        }
    }
}

/// Prints text to standard output; a reader that went away is not an error.
pub(super) fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Prints a line.
pub(super) fn say(line: &str) {
    print(&format!("{line}\n"));
}

/// Prints a value as JSON, indented.
pub(super) fn print_json<T: Serialize>(value: &T) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => say(&text),
        // Every type that is printed is made of strings, numbers, lists and maps with string keys.
        Err(error) => note(&format!("cannot write JSON: {error}")),
    }
}

/// Says something about the work to whoever watches, apart from the result.
pub(super) fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A progress bar over bytes; nothing is drawn unless standard error is a terminal.
pub(super) fn bytes_bar(what: String) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_no_line_ends_in_blanks() {
        let mut table = Table::new([Column::Text("NAME"), Column::Number("SIZE"), Column::Text("STATE")]);
        table.row(["a", "10", "up"].map(String::from));
        table.row(["longer", "9", ""].map(String::from));
        assert_eq!(table.render(), "NAME    SIZE  STATE\na         10  up\nlonger     9\n");
    }
}
