//! `capx playbook check|fmt`: what needs no server.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use capx_core::domain::playbook::{self, Problem, YAML_BYTES_MAX};
use owo_colors::{OwoColorize, Stream};
use serde_json::{Value, json};

use crate::out;

/// A file that was looked at.
struct Checked {
    name: String,
    text: String,
    /// Its name, how many steps it has and what it is warned of, or what is wrong.
    found: Result<(String, usize, Vec<Problem>), Vec<Problem>>,
}

/// Says what is wrong with files, or that nothing is.
pub(super) fn check(files: &[PathBuf], as_json: bool) -> anyhow::Result<()> {
    let mut checked = Vec::with_capacity(files.len());
    for file in files {
        let text = read(file)?;
        let found = playbook::read(&text).map(|(playbook, warnings)| (playbook.name, playbook.steps.len(), warnings));
        checked.push(Checked { name: name_of(file), text, found });
    }
    if as_json {
        out::line(Value::Array(checked.iter().map(Checked::to_json).collect()));
    } else {
        checked.iter().for_each(|checked| out::print(checked.told()));
    }
    match checked.iter().filter(|checked| checked.found.is_err()).count() {
        0 => Ok(()),
        wrong if checked.len() == 1 => bail!("{} is not in order", checked[wrong - 1].name),
        wrong => bail!("{wrong} of {} playbooks are not in order", checked.len()),
    }
}

/// Writes files in the canonical form.
pub(super) fn fmt(files: &[PathBuf], check: bool) -> anyhow::Result<()> {
    let (mut broken, mut differ) = (0, 0);
    for file in files {
        let text = read(file)?;
        let formatted = match playbook::format::format(&text) {
            Ok(formatted) => formatted,
            Err(problems) => {
                broken += 1;
                let checked = Checked { name: name_of(file), text, found: Err(problems) };
                out::aside(checked.told());
                continue;
            }
        };
        if file == Path::new("-") && !check {
            out::print(formatted);
        } else if formatted != text {
            differ += 1;
            if !check {
                replace(file, &formatted)?;
            }
            out::print(format!("{} {}\n", if check { "differs" } else { "formatted" }, name_of(file)));
        }
    }
    match (broken, differ) {
        (0, 0) => Ok(()),
        (0, _) if !check => Ok(()),
        (0, differ) => bail!("{differ} of {} playbooks are not in the canonical form", files.len()),
        (broken, _) => bail!("{broken} of {} playbooks are not in order and stay as they are", files.len()),
    }
}

/// Puts a text in a file's place: all of it, or nothing.
fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let told = || format!("{} cannot be written", file.display());
    // Behind a symbolic link, the file itself.
    let file = std::fs::canonicalize(file).with_context(told)?;
    let beside = file.with_extension(format!("capx-{}", std::process::id()));
    let written = std::fs::write(&beside, text)
        .and_then(|()| std::fs::set_permissions(&beside, std::fs::metadata(&file)?.permissions()))
        .and_then(|()| std::fs::rename(&beside, &file));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written.with_context(told)
}

fn name_of(file: &Path) -> String {
    if file == Path::new("-") { "stdin".to_owned() } else { file.display().to_string() }
}

/// A file's text; one that is too large is read as far as it takes to say so.
pub(super) fn read(file: &Path) -> anyhow::Result<String> {
    let limit = YAML_BYTES_MAX as u64 + 1;
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_end(&mut bytes).context("standard input cannot be read")?;
    } else {
        let opened = std::fs::File::open(file).with_context(|| format!("{} cannot be read", file.display()))?;
        opened.take(limit).read_to_end(&mut bytes).with_context(|| format!("{} cannot be read", file.display()))?;
    }
    String::from_utf8(bytes).with_context(|| format!("{} is no text in UTF-8", file.display()))
}

impl Checked {
    fn to_json(&self) -> Value {
        match &self.found {
            Ok((name, steps, warnings)) => {
                json!({"file": self.name, "valid": true, "name": name, "step_count": steps, "warnings": warnings})
            }
            Err(problems) => json!({"file": self.name, "valid": false, "problems": problems}),
        }
    }

    fn told(&self) -> String {
        match &self.found {
            Ok((name, steps, warnings)) => {
                let steps = if *steps == 1 { "1 step".to_owned() } else { format!("{steps} steps") };
                let good = "ok".if_supports_color(Stream::Stdout, |t| t.green()).to_string();
                format!("{}{good} {}: {name}, {steps}\n", self.tell(warnings), self.name)
            }
            Err(problems) => self.tell(problems),
        }
    }

    fn tell(&self, problems: &[Problem]) -> String {
        let mut told = String::new();
        for problem in problems {
            let word = match problem.warning {
                true => "warning".if_supports_color(Stream::Stdout, |t| t.yellow()).to_string(),
                false => "error".if_supports_color(Stream::Stdout, |t| t.red()).to_string(),
            };
            let path = if problem.path.is_empty() { String::new() } else { format!("{}: ", problem.path) };
            let _ = writeln!(told, "{word}: {path}{}", problem.message);
            let _ = writeln!(told, "  --> {}:{}:{}", self.name, problem.at.line, problem.at.column);
            if let Some(excerpt) = problem.excerpt(&self.text) {
                for line in excerpt.lines() {
                    let _ = writeln!(told, "  {}", line.if_supports_color(Stream::Stdout, |t| t.dimmed()));
                }
            }
            if let Some(suggestion) = &problem.suggestion {
                let help = "help".if_supports_color(Stream::Stdout, |t| t.cyan()).to_string();
                let _ = writeln!(told, "  {help}: {suggestion}");
            }
            told.push('\n');
        }
        told
    }
}

/// What is wrong with a text is said, and nothing else is done.
pub(super) fn refuse_broken(file: &Path, text: &str) -> anyhow::Result<()> {
    let Err(problems) = playbook::read(text) else { return Ok(()) };
    let checked = Checked { name: name_of(file), text: text.to_owned(), found: Err(problems) };
    out::aside(checked.told());
    bail!("{} is not in order", checked.name)
}
