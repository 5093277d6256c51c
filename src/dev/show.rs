//! What `capx dev` says on the terminal.

use std::path::Path;

use capx_core::domain::ids::{CompanyId, PlaybookId};
use capx_core::store::events::EventRow;
use owo_colors::{OwoColorize, Stream};

/// The voice of `capx dev`.
pub(super) struct Show;

impl Show {
    pub(super) fn new() -> Self {
        Self
    }

    /// A line of what is going on.
    #[expect(clippy::print_stderr, reason = "what is going on goes to stderr, data to stdout")]
    pub(super) fn line(&self, text: &str) {
        eprintln!("{} {text}", "·".if_supports_color(Stream::Stderr, |t| t.dimmed()));
    }

    /// Something that happened in the demo's run.
    pub(super) fn event(&self, event: &EventRow) {
        let data = &event.data;
        let text = |key: &str| data.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let detail = match event.event.as_str() {
            "playbook.started" => text("playbook"),
            "step.completed" => {
                let took = data.get("duration_ms").and_then(serde_json::Value::as_i64).unwrap_or(0);
                format!("{} ({}, {took} ms)", text("step"), text("action"))
            }
            "step.failed" => format!("{}: {}", text("step"), text("message")),
            "playbook.failed" => data.get("error").map(ToString::to_string).unwrap_or_default(),
            _ => String::new(),
        };
        let name = format!("{:<20}", event.event);
        let name = if event.event.ends_with("failed") {
            name.if_supports_color(Stream::Stderr, |t| t.red()).to_string()
        } else {
            name.if_supports_color(Stream::Stderr, |t| t.green()).to_string()
        };
        self.line(&format!("{name} {detail}"));
    }

    /// Where to go on.
    #[expect(clippy::print_stdout, reason = "the address and the key are the command's output")]
    pub(super) fn ready(&self, base_url: &str, key: &str, file: &Path, example: Option<(CompanyId, PlaybookId)>) {
        let bold = |text: &str| text.if_supports_color(Stream::Stdout, |t| t.bold()).to_string();
        println!();
        println!("  {}  {base_url}", bold("API"));
        println!("  {}  {key}", bold("key"));
        println!("  both stand in {}, too; stop with Ctrl-C", file.display());
        println!();
        println!("  export CAPX_API_URL={base_url} CAPX_API_KEY={key}");
        // As it was called: it may not stand in the path.
        let program = std::env::args().next().unwrap_or_else(|| "capx".to_owned());
        match example {
            Some((company, playbook)) => {
                println!("  {program} status");
                println!("  {program} playbook run hello -p topic=tides --wait");
                let path = format!("$CAPX_API_URL/v1/companies/{company}/playbooks/{playbook}");
                println!(
                    "  curl -H \"Authorization: Bearer $CAPX_API_KEY\" -H 'Content-Type: application/json' \\\n       -d '{{\"params\": {{\"topic\": \"tides\"}}}}' \"{path}/run?wait=10\""
                );
            }
            None => println!("  curl -H \"Authorization: Bearer $CAPX_API_KEY\" $CAPX_API_URL/v1/companies"),
        }
        println!();
    }
}
