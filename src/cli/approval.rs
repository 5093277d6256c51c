//! `capx approval …`

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::{Client, list, part};
use super::show;
use crate::out;

/// `capx approval …`
#[derive(Debug, Subcommand)]
pub enum ApprovalCommand {
    /// List what waits for a person, newest first.
    List {
        /// pending, approved, rejected, expired or cancelled.
        #[arg(long, default_value = "pending")]
        status: String,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show exactly what is to be decided.
    Get {
        /// `apr_…`, or a task's `tsk_…`.
        approval: String,
    },
    /// Allow it.
    Approve {
        /// `apr_…`, or a task's `tsk_…`.
        approval: String,
        /// A word to it.
        #[arg(long)]
        note: Option<String>,
    },
    /// Refuse it.
    Reject {
        /// `apr_…`, or a task's `tsk_…`.
        approval: String,
        /// Why; the run and its agent are told.
        #[arg(long)]
        feedback: String,
    },
}

/// Runs a command.
pub async fn run(client: &Client, command: ApprovalCommand) -> anyhow::Result<()> {
    let path = |approval: &str| format!("/v1/approvals/{}", part(approval));
    match command {
        ApprovalCommand::List { status, json } => {
            let asked = client.all("approvals", &format!("&status={}", part(&status))).await?;
            if json {
                show::json(&asked);
                return Ok(());
            }
            let rows = list(&asked).iter().map(|asked| {
                [
                    show::text(asked, "id"),
                    show::text(asked, "playbook"),
                    show::text(asked, "action_type"),
                    show::text(asked, "risk"),
                    show::text(asked, "proposed_at"),
                    show::text(asked, "expires_at"),
                ]
            });
            let heads = ["ID", "PLAYBOOK", "ACTION", "RISK", "ASKED", "EXPIRES"];
            show::table(heads, rows.collect(), &format!("nothing is {status}"));
        }
        ApprovalCommand::Get { approval } => show::json(&client.get(&path(&approval)).await?["data"]),
        ApprovalCommand::Approve { approval, note } => {
            decide(client, &format!("{}/approve", path(&approval)), json!({"note": note})).await?;
        }
        ApprovalCommand::Reject { approval, feedback } => {
            decide(client, &format!("{}/reject", path(&approval)), json!({"feedback": feedback})).await?;
        }
    }
    Ok(())
}

async fn decide(client: &Client, path: &str, word: Value) -> anyhow::Result<()> {
    let decided = &client.post(path, word).await?["data"];
    out::line(format_args!("{} {}", show::text(decided, "status"), show::text(decided, "id")));
    Ok(())
}
