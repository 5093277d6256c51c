//! `shell.run {command, stdin?}` and `code.execute {language?, code, stdin?}` ->
//! `{exit_code, stdout, stderr, files, removed}`: in the sandbox, with a copy of the run's
//! files; what the program changed of them is the run's when it has ended well or badly, and
//! nothing where its end was not heard of.

use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::outcome::{ErrorClass, Failure};
use capx_core::domain::secret::Secrets;
use serde_json::{Map, Value, json};

use super::workspace::{Workspace, WorkspaceFile};
use super::{SHELL_RUN, ToolCall, blocking, only, text};
use crate::handlers::Hands;
use crate::sandbox::limits::{FILES_BYTES_MAX, FILES_MAX, PRINTED_BYTES_END};
use crate::sandbox::{File, Order, Printed, Report};

/// The longest code, command or input, in bytes.
const TEXT_BYTES_MAX: usize = 256 * 1024;
/// So much of what was printed is in the message of a program that failed, by stream.
const TOLD_CHARS: usize = 800;
/// How long before its step a program ends, at most.
const MARGIN: Duration = Duration::from_secs(5);
/// The longest single argument that Linux starts a program with is 128 KiB; longer code is
/// read from its input.
const ARGUMENT_BYTES_MAX: usize = 100 * 1024;

pub(super) async fn run(hands: &Hands, tool: &str, call: ToolCall<'_>) -> Result<Value, Failure> {
    let (argv, stdin) = if tool == SHELL_RUN { command(&call.params)? } else { code(&call.params)? };
    let Some(sandbox) = &hands.sandbox else {
        return Err(Failure::invalid(format!(
            "{tool} is off: the operator allows programs by CAPX_ALLOW_PROGRAMS=1 on the workers, on machines where the sandbox holds"
        )));
    };
    let began = Instant::now();
    let turn = sandbox.turn().await?;
    let workspace = Arc::new(hands.workspaces.of(call.company, call.run));
    let files = blocking({
        let workspace = Arc::clone(&workspace);
        move || take(&workspace)
    });
    let order = Order { argv, stdin, millis: 0, files: files.await? };
    // It ends before its step does, so that what it said is told.
    let margin = MARGIN.min(call.timeout / 4);
    let time = call.timeout.saturating_sub(began.elapsed()).saturating_sub(margin);
    let mut report = turn.run(order, time).await?;
    let (key, secrets) = (call.idempotency_key, call.secrets.cloned());
    blocking(move || {
        keep(&workspace, &mut report, &key)?;
        answer(report, secrets.as_deref())
    })
    .await
}

fn short(params: &Map<String, Value>, name: &str) -> Result<String, Failure> {
    match params.get(name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) if text.len() <= TEXT_BYTES_MAX => Ok(text.clone()),
        Some(Value::String(_)) => {
            Err(Failure::invalid(format!("params.{name} has more than {TEXT_BYTES_MAX} bytes; write it to a file")))
        }
        Some(_) => Err(Failure::invalid(format!("params.{name} must be text"))),
    }
}

fn command(params: &Map<String, Value>) -> Result<(Vec<String>, String), Failure> {
    only(params, &["command", "stdin"])?;
    let stdin = short(params, "stdin")?;
    let argv: Vec<String> = match params.get("command") {
        Some(Value::Array(words)) => {
            words.iter().map(|word| word.as_str().map_or_else(|| word.to_string(), ToOwned::to_owned)).collect()
        }
        _ => vec!["/bin/sh".into(), "-c".into(), text(params, "command")?.to_owned()],
    };
    if argv.first().is_none_or(String::is_empty) {
        return Err(Failure::invalid("params.command is empty"));
    }
    if argv.iter().any(|word| word.len() > ARGUMENT_BYTES_MAX || word.contains('\0')) {
        return Err(Failure::invalid(format!(
            "a part of params.command has over {ARGUMENT_BYTES_MAX} bytes, or a NUL"
        )));
    }
    Ok((argv, stdin))
}

fn code(params: &Map<String, Value>) -> Result<(Vec<String>, String), Failure> {
    only(params, &["language", "code", "stdin"])?;
    let code = text(params, "code")?.to_owned();
    let stdin = short(params, "stdin")?;
    if code.len() > ARGUMENT_BYTES_MAX || code.contains('\0') {
        return Err(Failure::invalid(format!(
            "params.code has over {ARGUMENT_BYTES_MAX} bytes, or a NUL; write it to a file and run that"
        )));
    }
    let interpreter = match params.get("language").and_then(Value::as_str).unwrap_or("python") {
        "python" | "python3" => "python3",
        "sh" | "bash" | "shell" => "sh",
        other => {
            return Err(Failure::invalid(format!("params.language is python or sh; there is nothing for `{other}`")));
        }
    };
    Ok((vec![interpreter.into(), "-c".into(), code], stdin))
}

/// A copy of the run's files.
fn take(workspace: &Workspace) -> Result<Vec<File>, Failure> {
    let mut room = FILES_BYTES_MAX;
    let mut files = Vec::new();
    for path in workspace.paths(FILES_MAX)? {
        let bytes = workspace.file(&path).and_then(WorkspaceFile::read)?;
        room = room.checked_sub(bytes.len() as u64).ok_or_else(|| {
            Failure::invalid(format!(
                "the workspace holds more than {FILES_BYTES_MAX} bytes, which no program is given"
            ))
        })?;
        files.push(File::new(path, bytes));
    }
    Ok(files)
}

/// Takes over what the program has changed; what the workspace does not take is told.
fn keep(workspace: &Workspace, report: &mut Report, key: &str) -> Result<(), Failure> {
    // A directory may stand where a file was, and a file where a directory was.
    for path in &report.removed {
        workspace.remove(path)?;
    }
    for file in std::mem::take(&mut report.files) {
        match workspace.write(&file.path, &file.bytes, key) {
            Ok(()) => report.files.push(file),
            Err(failure) if failure.class == ErrorClass::Transient => return Err(failure),
            Err(failure) => report.left.push(failure.message),
        }
    }
    Ok(())
}

fn answer(mut report: Report, secrets: Option<&Secrets>) -> Result<Value, Failure> {
    for printed in [&mut report.stdout, &mut report.stderr] {
        if let Some(secrets) = secrets {
            secrets.redactor().text(&mut printed.text);
        }
    }
    let ended = match (report.timed_out, report.exit_code, report.signal) {
        (true, ..) => return Err(Failure::new(ErrorClass::Timeout, said(&report, "the program's time was over"))),
        (_, Some(0), _) => 0,
        _ if report.stdout.flooded || report.stderr.flooded => {
            return Err(Failure::invalid(format!(
                "the program was ended, since it printed over {PRINTED_BYTES_END} bytes"
            )));
        }
        (_, Some(code), _) => return Err(Failure::invalid(said(&report, &format!("the program ended with {code}")))),
        (_, None, signal) => {
            let signal = signal.unwrap_or_default();
            return Err(Failure::invalid(said(&report, &format!("the program was ended by signal {signal}"))));
        }
    };
    let mut output = json!({
        "exit_code": ended, "stdout": report.stdout.text, "stderr": report.stderr.text,
        "files": report.files.iter().map(|file| &file.path).collect::<Vec<_>>(), "removed": report.removed,
    });
    if report.stdout.cut || report.stderr.cut {
        output["cut"] = true.into();
    }
    if !report.left.is_empty() {
        output["left"] = json!(report.left);
    }
    Ok(output)
}

/// Why a program failed, with the last that it said.
fn said(report: &Report, why: &str) -> String {
    let last = |printed: &Printed| {
        let text = printed.text.trim_end();
        let from = text.char_indices().rev().nth(TOLD_CHARS - 1).map_or(0, |(at, _)| at);
        text[from..].to_owned()
    };
    let mut message = why.to_owned();
    for (name, printed) in [("stderr", last(&report.stderr)), ("stdout", last(&report.stdout))] {
        if !printed.is_empty() {
            message.push_str(&format!("; {name}: {printed}"));
        }
    }
    message
}
