//! What a command says: its data on standard output, all else on standard error.

use std::fmt::Display;
use std::io::Write;

/// Prints a text as it is, at once. A reader that has gone, such as `head`, is no
/// error: nobody wants the rest.
pub fn print(text: impl Display) {
    let _ = std::io::stdout().write_all(text.to_string().as_bytes());
}

/// The same with bytes.
pub fn bytes(bytes: &[u8]) {
    let _ = std::io::stdout().write_all(bytes);
}

/// The same with the end of a line.
pub fn line(text: impl Display) {
    print(format_args!("{text}\n"));
}

/// Says what is no data, on standard error.
pub fn aside(text: impl Display) {
    let _ = std::io::stderr().write_all(text.to_string().as_bytes());
}
