//! An agent's work: turns of its model and the tools that it asks for, until it answers.
//! What comes next is decided by what the journal holds, so that a worker that takes over
//! goes on with the first call that has no result.

use std::time::{Duration, Instant};

use capx_core::domain::agent::conversation::Called;
use capx_core::domain::agent::conversation::{Next, TURNS_DEFAULT, TURNS_MAX, Turn, cut, messages, next, shown};
use capx_core::domain::agent::message::{Message, Reply, ToolResult};
use capx_core::domain::agent::price::Price;
use capx_core::domain::digest;
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::{Failure, Outcome};
use capx_core::engine::spending::{self, Asked, Came, HELD};
use capx_core::failpoint;
use capx_core::store::agents::AgentRow;
use capx_core::store::journal::Place;
use serde_json::{Value, json};

use crate::adapters::{self, Adapter, Answered, Ask, Offer, Payment, Task, Trouble};
use crate::handlers::{Hands, StepCall};
use crate::journal::{Journal, Journals};
use crate::tools::registry::{self, OnUnknown, Tool};
use crate::tools::{self, ToolCall};

mod prompt;

/// One attempt at a piece of work.
struct Attempt<'a> {
    hands: &'a Hands,
    call: &'a StepCall<'a>,
    agent: &'a AgentRow,
    adapter: Box<dyn Adapter>,
    model: &'a str,
    journal: Journal<'a>,
    tools: Vec<&'static Tool>,
    system: String,
    task: Task<'a>,
    /// How often the model may be asked.
    turns_max: u32,
    /// The number of the first turn that counts.
    base: u32,
    turns: Vec<Turn>,
}

/// Lets the agent of the step's role do it; what it costs is booked in a category.
pub async fn work(hands: &Hands, call: StepCall<'_>, journals: &Journals<'_>, category: &'static str) -> Outcome {
    let params = Value::Object(call.params.clone());
    match converse(hands, &call, &params, (journals, category)).await {
        Ok(output) => Outcome::Done { output, cost: journals.booked() },
        Err(Halt::Failed(failure)) => Outcome::Failed { failure, cost: journals.booked() },
        Err(Halt::Waits(delay)) => Outcome::Released { delay },
    }
}

/// Why an attempt goes no further.
enum Halt {
    /// It has failed.
    Failed(Failure),
    /// It is not its time: it is taken up again after a while, and no try is charged.
    Waits(Duration),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

async fn converse(
    hands: &Hands,
    call: &StepCall<'_>,
    params: &Value,
    (journals, category): (&Journals<'_>, &'static str),
) -> Result<Value, Halt> {
    let role = call.step.role.as_deref().unwrap_or_default();
    let agent = call.agent.ok_or_else(|| {
        Failure::invalid(format!(
            "no agent of this company has the role `{role}`; add one, or correct the playbook's role"
        ))
    })?;
    if agent.status == "errored" {
        let why = agent.error.as_deref().unwrap_or("no reason is known");
        return Err(Failure::invalid(format!("the agent `{role}` is errored: {why}")).into());
    }
    let name = call.step.adapter.as_deref().unwrap_or(&agent.adapter);
    let adapter = hands.providers.adapter(name).map_err(Failure::invalid)?;
    // A model belongs to its adapter: that of the agent is not asked of another one.
    let own = (name == agent.adapter).then_some(agent.model.as_deref()).flatten();
    let model = call.step.model.as_deref().or(own);
    let journal = journals.of(&call.idempotency_key, agent.agent, category);
    if agent.status == "paused" {
        journal.hold().await?;
        return Err(Halt::Waits(HELD));
    }
    let written = journal.read().await?;
    let turns_max = agent.config.get("max_turns").and_then(Value::as_u64).and_then(|turns| u32::try_from(turns).ok());
    let mut attempt = Attempt {
        model: model.unwrap_or(adapter.default_model()),
        hands,
        call,
        agent,
        adapter,
        journal,
        tools: registry::offered(agent.config.get("tools").and_then(Value::as_array)),
        system: prompt::system(agent),
        task: Task {
            company: call.company.to_string(),
            run: call.run.to_string(),
            playbook: &call.playbook.name,
            step: &call.step.id,
            action: &call.step.action,
            params,
            feedback: call.feedback,
        },
        turns_max: turns_max.unwrap_or(TURNS_DEFAULT).clamp(1, TURNS_MAX),
        base: written.base,
        turns: written.turns,
    };
    let over = matches!(next(&attempt.turns, attempt.turns_max), Next::Done(_) | Next::Stuck(_));
    if over && written.of_another {
        // The attempt that said this has failed with it: this one begins anew.
        attempt.base += u32::try_from(attempt.turns.len()).unwrap_or(u32::MAX);
        attempt.turns.clear();
    }
    attempt.run().await
}

impl Attempt<'_> {
    async fn run(mut self) -> Result<Value, Halt> {
        loop {
            match next(&self.turns, self.turns_max) {
                Next::Turn(turn) => {
                    let turn = self.turn(turn).await?;
                    self.turns.push(turn);
                }
                Next::Call { turn, call, id, name, input, unknown } => {
                    let called = self.tool(Place { turn: self.base + turn, call }, id, name, input, unknown).await?;
                    let place = usize::try_from(call - 1).unwrap_or(usize::MAX);
                    if let Some(turn) = self.turns.last_mut() {
                        turn.calls.truncate(place);
                        turn.calls.push(Some(called));
                    }
                }
                Next::Done(output) => return Ok(output),
                Next::Stuck(failure) => return Err(failure.into()),
            }
        }
    }

    fn left(&self) -> Duration {
        self.call.timeout.saturating_sub(self.call.began.elapsed())
    }

    /// The key of a call: that of the work itself for its first one.
    fn key(&self, place: Place) -> String {
        digest::call_key(&self.call.idempotency_key, place.turn, place.call)
    }

    /// Asks the model once more.
    async fn turn(&self, number: u32) -> Result<Turn, Halt> {
        let fresh = number == 0 && self.base > 0;
        let number = self.base + number;
        let place = Place { turn: number, call: 0 };
        let key = self.key(place);
        let messages = messages(prompt::task(&self.task), &self.turns);
        let timeout = adapters::turn_timeout(self.adapter.as_ref(), self.agent)?.min(self.left());
        let offers: Vec<Offer<'_>> = self.tools.iter().map(|tool| offer(tool)).collect();
        let ask = Ask {
            agent: self.agent,
            model: self.model,
            system: &self.system,
            messages: &messages,
            tools: &offers,
            max_tokens: adapters::max_tokens(self.agent),
            key: &key,
            timeout,
            idle: self.call.idle,
            task: &self.task,
        };
        let (table, price) = self.price(&ask)?;
        let turn = spending::Turn {
            place,
            model: self.model.to_owned(),
            key: key.clone(),
            fresh,
            price,
            keyed: self.adapter.payment() == Payment::Told,
            run_cap: self.call.playbook.budget,
            step_cap: self.call.step.budget,
            playbook_cap: self.call.playbook.execution.spend_cap,
        };
        match self.journal.turn_begins(&turn).await? {
            Asked::Go => {}
            Asked::Wait(delay) => return Err(Halt::Waits(delay)),
            Asked::Refused(failure) => return Err(failure.into()),
            Asked::Lost => return Err(Halt::Waits(Duration::ZERO)),
        }
        failpoint::reach("agent.turn_begun").await;
        let began = Instant::now();
        let answered = self.adapter.turn(&self.hands.egress, &ask).await;
        failpoint::reach("agent.turn_answered").await;
        match answered {
            Ok(Answered { reply, cost }) => {
                let cost = cost.unwrap_or_else(|| paid(table, price, &reply));
                self.journal.turn_ended(&turn, Came::Answer { response: json!(reply), cost }).await?;
                failpoint::reach("agent.turn_stored").await;
                tracing::debug!(
                    run.id = %self.task.run, agent.id = %self.agent.agent, model = self.model, turn = number,
                    cost_nanos = cost.0, took_ms = began.elapsed().as_millis(), "a model has answered"
                );
                Ok(Turn { reply, calls: Vec::new() })
            }
            Err(Trouble { failure, maybe_paid, .. }) => {
                let came = Came::Trouble { failure: failure.clone(), maybe_paid };
                self.journal.turn_ended(&turn, came).await?;
                Err(failure.into())
            }
        }
    }

    /// What the model's tokens cost, and what the turn may: a model without a price is not
    /// asked.
    fn price(&self, ask: &Ask<'_>) -> Result<(Option<&Price>, spending::Price), Failure> {
        let prices = &self.hands.providers.prices;
        // Prices change by days: which clock says so does not matter.
        let price = prices.of(self.model, chrono::Utc::now().date_naive());
        match (self.adapter.payment(), price) {
            (Payment::Free, _) => Ok((None, spending::Price::AtMost(Nanos::ZERO))),
            (Payment::Told, price) => Ok((price, spending::Price::Afterwards)),
            (Payment::Priced, Some(price)) => {
                let worst = price.worst(self.read_at_most(ask), ask.max_tokens);
                let worst =
                    worst.ok_or_else(|| Failure::invalid("a turn of the model costs more than can be counted"))?;
                Ok((Some(price), spending::Price::AtMost(worst)))
            }
            (Payment::Priced, None) => Err(Failure::invalid(format!(
                "the model `{}` has no price, so nobody could say what it costs: name it in the file of CAPX_PRICES, or use one of {}",
                self.model,
                prices.models().join(", ")
            ))),
        }
    }

    /// What the provider can read at most, in tokens: none is shorter than a byte. Of what it
    /// has read before it has told how much that was.
    fn read_at_most(&self, ask: &Ask<'_>) -> u64 {
        let mut known = 0;
        let mut said = ask.messages;
        if let Some(usage) = self.turns.last().and_then(|turn| turn.reply.usage) {
            known = usage.read().saturating_add(usage.output);
            // Its own words are counted; what came after them is not.
            let last = ask.messages.iter().rposition(|message| matches!(message, Message::Assistant(_)));
            said = ask.messages.get(last.map_or(0, |at| at + 1)..).unwrap_or_default();
        }
        let bytes = |message: &Message| match message {
            Message::User(text) => text.len(),
            Message::Assistant(blocks) => serde_json::to_string(blocks).map_or(0, |text| text.len()),
            Message::Results(results) => results.iter().map(|result| result.content.len() + result.id.len()).sum(),
        };
        let mut bytes: usize = said.iter().map(bytes).sum();
        if known == 0 {
            bytes += ask.system.len();
            bytes += ask.tools.iter().map(|tool| tool.schema.to_string().len() + tool.description.len()).sum::<usize>();
        }
        u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(known).saturating_add(OVERHEAD_TOKENS)
    }

    /// Makes a call that the model has asked for; what is wrong with it is told to the model.
    async fn tool(
        &self,
        place: Place,
        id: String,
        name: String,
        input: Value,
        unknown: bool,
    ) -> Result<Called, Failure> {
        let told =
            |content: String, is_error: bool| ToolResult { id, name: name.clone(), content: cut(content), is_error };
        let (tool, params) = match self.checked(&name, input) {
            Ok(checked) => checked,
            Err(problem) => {
                let result = told(problem, true);
                self.journal.call_begins(place, &name, &self.key(place)).await?;
                self.journal.call_ended(place, &result, true).await?;
                return Ok(Called::Done { result, refused: true });
            }
        };
        if unknown && tool.on_unknown == OnUnknown::Review {
            return Err(Failure::invalid(format!(
                "a worker died over a call of `{}`, and nobody knows whether it was made; look at what it did, and retry the run",
                tool.name
            )));
        }
        let key = self.key(place);
        self.journal.call_begins(place, tool.name, &key).await?;
        failpoint::reach("agent.call_begun").await;
        let call = ToolCall {
            company: self.call.company,
            run: self.call.run,
            params,
            secrets: None,
            artifacts: self.call.artifacts,
            idempotency_key: key,
            timeout: self.left(),
            idle: self.call.idle,
        };
        let result = match tools::use_tool(self.hands, tool.name, call).await {
            Ok(output) => told(shown(&output), false),
            Err(failure) => told(failure.message, true),
        };
        failpoint::reach("agent.call_made").await;
        self.journal.call_ended(place, &result, false).await?;
        failpoint::reach("agent.call_stored").await;
        Ok(Called::Done { result, refused: false })
    }

    /// The tool that a model means, and its arguments; or what is wrong with them.
    fn checked(&self, name: &str, input: Value) -> Result<(&'static Tool, serde_json::Map<String, Value>), String> {
        let Some(tool) = registry::find(&self.tools, name) else {
            let offered: Vec<String> = self.tools.iter().map(|tool| tool.wire_name()).collect();
            return Err(match offered.is_empty() {
                true => format!("there is no tool `{name}`: you have none"),
                false => format!("there is no tool `{name}`; you have {}", offered.join(", ")),
            });
        };
        match (tool.problem(&input), input) {
            (None, Value::Object(params)) => Ok((tool, params)),
            (Some(problem), _) => Err(problem),
            (None, _) => Err(format!("the arguments of `{}` are no object", tool.name)),
        }
    }
}

/// A tool as a model is told of it.
fn offer(tool: &Tool) -> Offer<'_> {
    Offer { name: tool.wire_name(), description: tool.description, schema: &tool.schema }
}

/// What a turn has cost by what it has used; at its worst, where the provider does not say.
fn paid(table: Option<&Price>, price: spending::Price, reply: &Reply) -> Nanos {
    match (table, &reply.usage, price) {
        (Some(table), Some(usage), _) => table.cost(usage).unwrap_or(Nanos::ZERO),
        (_, None, spending::Price::AtMost(worst)) => worst,
        _ => Nanos::ZERO,
    }
}

/// What providers add around it: the prompt that explains tools is some hundred tokens
/// (Anthropic's pricing page names up to 1,000), and a few for each message.
const OVERHEAD_TOKENS: u64 = 2_000;
