//! What the tokens of models cost, by a table with dates, in nano-dollars a token: one
//! USD for a million tokens is 1,000 of them, so that every list price is a whole number.

use chrono::NaiveDate;
use serde::Deserialize;

use super::message::Usage;
use crate::domain::money::Nanos;

/// What a model's tokens cost since a day.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// The model's name, without the date of a snapshot.
    pub model: String,
    /// Other names of the same.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The first day on which it holds.
    pub from: NaiveDate,
    /// For each token.
    pub rates: Rates,
    /// For each token of a turn that reads much.
    pub long: Option<Long>,
}

/// Nano-dollars for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// What is read.
    pub input: i64,
    /// What is said.
    pub output: i64,
    /// What is read from a cache.
    pub cache_read: i64,
    /// What is written into a cache for five minutes.
    pub cache_write: i64,
    /// What is written into a cache for an hour.
    pub cache_write_1h: i64,
}

/// Other rates for turns that read more than so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Long {
    /// The most that is read at the usual rates.
    pub over: u64,
    /// The rates behind that.
    pub rates: Rates,
}

/// The providers' public list prices, as far as they were known on the day of the build.
const LIST: &str = include_str!("prices.json");

/// The prices of models.
#[derive(Debug, Clone)]
pub struct Prices(Vec<Price>);

impl Prices {
    /// The list prices of this version.
    pub fn list() -> Self {
        // A test reads it, too.
        Self::read(LIST).unwrap_or(Self(Vec::new()))
    }

    /// The list prices, and before them those of a file of the same form.
    pub fn with(own: &str) -> Result<Self, String> {
        let mut prices = Self::read(own)?;
        prices.0.extend(Self::list().0);
        Ok(prices)
    }

    fn read(text: &str) -> Result<Self, String> {
        let prices: Vec<Price> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let negative = |price: &&Price| price.all_rates().any(|rates| rates.parts().iter().any(|rate| *rate < 0));
        if let Some(price) = prices.iter().find(negative) {
            return Err(format!("a price of `{}` is negative", price.model));
        }
        Ok(Self(prices))
    }

    /// What a model costs on a day. Snapshots, which have a date behind their name, cost what
    /// their model does.
    pub fn of(&self, model: &str, on: NaiveDate) -> Option<&Price> {
        let plain = without_date(model);
        let named = |price: &&Price| {
            price.model == plain || price.model == model || price.aliases.iter().any(|a| a == model || a == plain)
        };
        let newest = self.0.iter().filter(named).filter(|price| price.from <= on).map(|price| price.from).max()?;
        self.0.iter().filter(named).find(|price| price.from == newest)
    }

    /// The models that have a price, for a message.
    pub fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = self.0.iter().map(|price| price.model.as_str()).collect();
        models.sort_unstable();
        models.dedup();
        models
    }
}

/// `claude-sonnet-4-6-20260217` and `gpt-4o-2024-08-06` without their dates.
fn without_date(model: &str) -> &str {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if let Some((name, date)) = model.rsplit_once('-')
        && date.len() == 8
        && digits(date)
    {
        return name;
    }
    let dated = model.len().checked_sub("-2024-08-06".len()).and_then(|at| model.split_at_checked(at));
    match dated {
        Some((name, date)) if !name.is_empty() => {
            let shape = date
                .bytes()
                .enumerate()
                .all(|(i, b)| if [0, 5, 8].contains(&i) { b == b'-' } else { b.is_ascii_digit() });
            if shape { name } else { model }
        }
        _ => model,
    }
}

impl Price {
    fn all_rates(&self) -> impl Iterator<Item = Rates> {
        std::iter::once(self.rates).chain(self.long.map(|long| long.rates))
    }

    fn rates_for(&self, read: u64) -> Rates {
        self.long.filter(|long| read > long.over).map_or(self.rates, |long| long.rates)
    }

    /// What a turn cost. `None` over what can be written down.
    pub fn cost(&self, usage: &Usage) -> Option<Nanos> {
        let tokens = [usage.input, usage.output, usage.cache_read, usage.cache_write, usage.cache_write_1h];
        let mut sum = 0_i64;
        for (tokens, rate) in tokens.into_iter().zip(self.rates_for(usage.read()).parts()) {
            sum = sum.checked_add(i64::try_from(tokens).ok()?.checked_mul(rate)?)?;
        }
        Some(Nanos(sum))
    }

    /// The most that a turn can cost which reads at most so many tokens, and says at most so
    /// many. Nobody here asks for a cache of an hour, whose rate is higher still.
    pub fn worst(&self, input: u64, output: u64) -> Option<Nanos> {
        let rates = self.all_rates().filter(|rates| *rates == self.rates || self.rates_for(input) == *rates);
        let worst = rates.map(|rates| {
            let read =
                i64::try_from(input).ok()?.checked_mul(rates.input.max(rates.cache_write).max(rates.cache_read))?;
            read.checked_add(i64::try_from(output).ok()?.checked_mul(rates.output)?)
        });
        worst.collect::<Option<Vec<_>>>()?.into_iter().max().map(Nanos)
    }
}

impl Rates {
    /// As [`Usage`] has its kinds.
    fn parts(self) -> [i64; 5] {
        [self.input, self.output, self.cache_read, self.cache_write, self.cache_write_1h]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(text: &str) -> NaiveDate {
        text.parse().expect("a day")
    }

    #[test]
    fn the_list_is_read_and_every_model_has_a_price() {
        let prices = Prices::read(LIST).expect("the list");
        let today = day("2026-11-24");
        for (model, input, output) in [
            ("claude-sonnet-4-6", 3_000, 15_000),
            ("claude-sonnet-4-6-20260217", 3_000, 15_000),
            ("gpt-4o", 2_500, 10_000),
            ("gpt-4o-2024-08-06", 2_500, 10_000),
            ("gpt-4o-mini", 150, 600),
            ("claude-haiku-4", 1_000, 5_000),
        ] {
            let price = prices.of(model, today).unwrap_or_else(|| panic!("{model} has no price"));
            assert_eq!((price.rates.input, price.rates.output), (input, output), "{model}");
        }
        for unknown in ["gpt-4o-mega", "claude", "", "gpt-4o-20x4-08-06"] {
            assert!(prices.of(unknown, today).is_none(), "{unknown}");
        }
        assert!(prices.of("gpt-4o", day("2000-01-01")).is_none(), "no price before its first day");
    }

    #[test]
    fn a_turn_costs_to_the_nano_dollar_and_never_more_than_its_worst() {
        let prices = Prices::list();
        let price = prices.of("claude-sonnet-4-6", day("2026-11-24")).expect("a price");
        let usage = Usage { input: 1_001, output: 37, cache_read: 11, cache_write: 7, cache_write_1h: 0 };
        let cost = price.cost(&usage).expect("a cost");
        assert_eq!(cost, Nanos(1_001 * 3_000 + 37 * 15_000 + 11 * 300 + 7 * 3_750));
        assert!(price.worst(usage.read(), 37).expect("a cost") >= cost);
        assert_eq!(price.cost(&Usage { input: u64::MAX, ..Usage::default() }), None);
    }

    #[test]
    fn a_turn_that_reads_much_has_other_rates() {
        let prices = Prices::list();
        let price = prices.of("claude-haiku-5-5", day("2026-11-24")).expect("a price");
        let read = |input| Usage { input, cache_read: 1, output: 1, ..Usage::default() };
        assert_eq!(price.cost(&read(99_999)), Some(Nanos(99_999 * 100 + 10 + 500)));
        assert_eq!(price.cost(&read(100_000)), Some(Nanos(100_000 * 500 + 50 + 2_500)));
        assert!(price.worst(100_001, 1) >= price.cost(&read(100_000)));
        assert!(price.worst(99_000, 1) < price.worst(101_000, 1));
    }

    #[test]
    fn own_prices_come_first_and_hold_from_their_day() {
        let own = r#"[{"model": "gpt-4o", "from": "2026-12-01",
            "rates": {"input": 1, "output": 2, "cache_read": 0, "cache_write": 1, "cache_write_1h": 1}}]"#;
        let prices = Prices::with(own).expect("prices");
        assert_eq!(prices.of("gpt-4o", day("2026-11-30")).map(|p| p.rates.input), Some(2_500));
        assert_eq!(prices.of("gpt-4o", day("2026-12-01")).map(|p| p.rates.input), Some(1));
        assert!(Prices::with("[{]").is_err());
        assert!(
            Prices::with(&own.replace("\"output\": 2", "\"output\": -2")).expect_err("negative").contains("gpt-4o")
        );
    }
}
