//! What a command's exit code says.

use std::fmt;

/// The codes, for `--help`.
pub const HELP: &str = "Exit codes of the client:
  0  done
  1  what was asked about is not in order: a file with errors, a run that failed
  2  the command line is wrong
  3  the server refuses it
  4  there is no server, or it is not able to answer now";

/// Not in order.
pub const FAILED: u8 = 1;
/// Not written as it should be.
pub const WRONG: u8 = 2;
/// Refused by the server.
pub const REFUSED: u8 = 3;
/// No answer.
pub const AWAY: u8 = 4;

/// An error that ends the program with a code of its own.
#[derive(Debug)]
pub struct Exit {
    /// The code.
    pub code: u8,
    /// What is said.
    pub told: String,
}

impl Exit {
    /// Ends with a code.
    pub fn with(code: u8, told: impl Into<String>) -> anyhow::Error {
        Self { code, told: told.into() }.into()
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.told)
    }
}

impl std::error::Error for Exit {}
