//! How answers look on a terminal.

use comfy_table::Table;
use owo_colors::{OwoColorize, Stream};
use serde_json::Value;

use super::client::list;
use crate::out;

/// A table without lines, or that there is nothing.
pub fn table<const N: usize>(heads: [&str; N], rows: Vec<[String; N]>, nothing: &str) {
    if rows.is_empty() {
        out::aside(format_args!("{nothing}\n"));
        return;
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(heads);
    for row in rows {
        table.add_row(row.map(|cell| visible(&cell)));
    }
    // Without the blanks that fill the last column.
    for line in table.to_string().lines() {
        out::line(line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()));
    }
}

/// One JSON value, for programs.
pub fn json(value: &Value) {
    out::line(serde_json::to_string_pretty(value).unwrap_or_default());
}

/// What stands at a key: a text as it is, nothing as a dash.
pub fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// An amount in USD, as exactly as it takes.
pub fn usd(value: &Value) -> String {
    match value.as_f64() {
        None => "-".to_owned(),
        Some(0.0) => "$0".to_owned(),
        Some(usd) if usd.abs() < 0.01 => format!("${usd:.6}"),
        Some(usd) => format!("${usd:.2}"),
    }
}

/// A number of seconds.
pub fn seconds(value: &Value) -> String {
    match value.as_i64() {
        None => "-".to_owned(),
        Some(all) if all < 60 => format!("{all} s"),
        Some(all) if all < 3600 => format!("{} min {} s", all / 60, all % 60),
        Some(all) => format!("{} h {} min", all / 3600, all % 3600 / 60),
    }
}

/// A status in the colour of its kind; for lines, since a table counts what colours
/// take as width.
pub fn status(status: &str) -> String {
    let last = status.rsplit('.').next().unwrap_or(status);
    match last {
        "completed" | "active" | "approved" | "running" | "started" | "resolved" => {
            status.if_supports_color(Stream::Stdout, |t| t.green()).to_string()
        }
        "failed" | "rejected" | "expired" | "cancelled" | "stopped" => {
            status.if_supports_color(Stream::Stdout, |t| t.red()).to_string()
        }
        _ => status.if_supports_color(Stream::Stdout, |t| t.yellow()).to_string(),
    }
}

/// What comes from elsewhere moves no cursor and sets no colour.
pub fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What a run waits for, in words.
pub fn waits(run: &Value) -> Vec<String> {
    let told = |wait: &Value| {
        let until = match wait["expires_at"].as_str() {
            Some(until) => format!(" until {until}"),
            None => String::new(),
        };
        let id = text(wait, "id");
        match wait["type"].as_str().unwrap_or_default() {
            "approval" => format!("an approval{until}: capx approval approve {id}"),
            "timer" => format!("the time of the step `{id}`{until}"),
            "event" => format!("the event `{id}`{until}"),
            "company" => "the company, which is not active".to_owned(),
            "concurrency" => format!("other runs with the concurrency key `{id}`"),
            other => format!("{other} {id}{until}"),
        }
    };
    list(&run["waiting_on"]).iter().map(|wait| visible(&told(wait))).collect()
}

/// A run with its steps.
pub fn run(run: &Value) {
    let id = text(run, "run_id");
    let head = format!("{id}  {}  {}  {}", status(&text(run, "status")), usd(&run["cost"]), seconds(&run["duration"]));
    out::line(head);
    for wait in waits(run) {
        out::line(format_args!("  waits for {wait}"));
    }
    if let Some(message) = run["error"]["message"].as_str() {
        let told = message.if_supports_color(Stream::Stdout, |t| t.red()).to_string();
        out::line(format_args!("  {}", told.replace('\n', "\n  ")));
    }
    let steps = list(&run["steps"]);
    let rows = steps.iter().map(|step| {
        let items = match step["items"].is_object() {
            true => format!("{}/{} items", step["items"]["completed"], step["items"]["total"]),
            false => String::new(),
        };
        let more = [&step["error"]["message"], &step["child_run_id"]].iter().find_map(|v| v.as_str());
        let more = more.map(str::to_owned).or_else(|| Some(format!("score {}", step["score"].as_f64()?)));
        [
            text(step, "id"),
            text(step, "action"),
            text(step, "status"),
            text(step, "attempts"),
            usd(&step["cost"]),
            seconds(&step["duration"]),
            if items.is_empty() { short(&more.unwrap_or_default()) } else { items },
        ]
    });
    if !steps.is_empty() {
        out::line("");
        table(["STEP", "ACTION", "STATUS", "TRIES", "COST", "TOOK", ""], rows.collect(), "");
    }
    if !run["output"].is_null() {
        out::line("");
        json(&run["output"]);
    }
}

/// The beginning of a text.
pub fn short(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
