"""Words that evaluation tasks hide and count: plain English, none contained in another. Knows no task.

The list is the project's own. That no word contains another keeps a score by substrings honest.
"""

# ruff: noqa: SIM905 - a list of 1,149 quoted words could not be read

ADJECTIVES = tuple(
    """
    absent acrid airy alert amber ample ancient angular anxious arctic arid ashen astute austere avid awkward
    azure bashful benign bitter bland blatant bleak blithe blunt bold brave breezy brief bright brisk brittle
    bronze bulky calm candid careful cautious cheerful chilly civic clever cloudy clumsy coarse coastal cobalt
    colossal compact cordial cosmic crafty creamy crimson crisp crooked crude cryptic curious curly damp daring
    decent deft delicate dense devout diligent distant docile dreary drowsy dusty eager earnest earthy eastern
    elastic elegant eloquent eminent empty enormous entire epic erratic exact exotic fabled faint famous fancy
    feeble fertile festive fickle fierce fiery filthy flawless fluent fluffy foggy foreign fragile frank frantic
    fresh frosty frugal funny fuzzy gallant gaudy gentle genuine giddy gifted glacial gleaming gloomy glossy
    golden graceful grand grateful gritty grumpy guilty handsome hardy harsh hasty hazel heavy hectic hidden
    hoarse hollow honest humble humid hungry idle immense ivory jaded jagged jolly jovial joyful juicy keen kind
    lavish lazy lenient level limber little lively lofty lonely loyal lucid lucky lunar lush magenta majestic
    marble mellow merry mighty minty misty modest moist mossy muddy murky musty mystic narrow nasty neat nervous
    nimble noble noisy northern novel obscure oddball olive opaque orderly ornate oval pale patient peculiar
    pensive perky placid plump polite porous posh potent precise prickly prime pristine proper proud prudent
    puffy pungent purple puzzled quaint quick quiet quirky rapid rare raspy ready regal rigid robust rocky rosy
    rotten rough round rugged rural rustic sacred salty sandy scarce scarlet secret serene severe shady shallow
    sharp sheepish shiny shrewd silent silky silver simple sincere sleek sleepy slender slim slow sluggish smoky
    smooth sober solar solemn solid somber sonic sour southern spare sparse spicy spiral splendid spotted square
    stable stark steady steep sterile sticky stormy strict stubborn sturdy subtle sudden sullen sunny supple
    swift tacit tame tangy tardy teal tender tense tepid thick thin thirsty thrifty tidal tidy timid tiny
    topical torrid tough tragic tranquil trim tropical trusty turbid twisted ugly unique upbeat urban urgent
    usual vague valiant vapid vast velvet verbal vibrant vicious vivid vocal wary watery weak wealthy weary
    weird western wicked wild windy wise witty wooden woolly wordy worthy yearly yellow young zany zealous zesty
    """.split()
)
NOUNS = tuple(
    """
    abbey acorn album alcove almond alpaca anchor anvil apple apron arcade archer armor atlas autumn badge bagel
    bakery ballad balloon bamboo banjo banner barley barrel basil basket bayou beacon beaker beaver beetle bell
    bench berry bicycle birch biscuit bison blanket blossom bobbin bonnet bottle boulder bridge broom bucket
    buffalo bugle bulb bumper bunker burrow button cabbage cabin cactus camel camera candle canoe canyon captain
    caravan carpet carrot castle cavern cedar cello chapel chariot cheese cherry chimney chisel cider cinema
    circus citadel clarinet cliff clock clover cobra coconut collar comet compass copper coral cottage coyote
    crater crayon cricket crystal cupboard curtain cushion cypress dagger daisy dancer desert diary dolphin
    donkey doorway dragon drawer drum duchess dune dynamo eagle echo eclipse elbow elder elephant emerald engine
    envelope estate falcon farmer feather fence ferry fiddle fiord fjord flannel flask flute forest fossil
    fountain freezer fridge frigate funnel galaxy gallery garlic garnet gazelle geyser ginger giraffe glacier
    glove goblet goose gopher gorge granite grape gravel griffin grotto guitar gutter hamlet hammer hammock
    harbor harvest hatchet hazard hedge helmet hermit heron hickory hinge hockey hornet hotel hunter hurdle
    hyacinth iceberg igloo iguana inlet insect island jackal jacket jaguar jasmine jersey jewel jigsaw jockey
    jungle juniper kayak kernel kettle keyboard kingdom kitchen kite kitten knight koala ladder lagoon lantern
    laptop larch lasso lattice laurel lavender lawyer ledger lemon leopard lettuce library lighter lilac lily
    limpet linen lizard llama lobster locket locust lodge lumber lynx magnet magpie mammoth mandolin mango
    mantle maple marina market marlin marsh mason meadow medal melon mermaid meteor midwife mirror mitten moat
    monarch monkey monsoon moose mosaic motor mountain muffin mullet museum mushroom musket mustard napkin
    nebula nectar needle nephew nettle nickel noodle notebook nozzle nugget nursery oasis oboe ocean octopus
    office onion orange orchard orchid organ osprey ostrich oven oyster paddle pagoda painter palace panda
    panther papaya paper parade parcel parrot pasture patio peanut pebble pelican pencil penguin pepper petal
    piano pickle pigeon pillow pilot pirate piston pizza planet plaza pocket poet pollen pony poplar porch
    portrait potato potter prairie princess prism pudding pulley puma pumpkin puppet pyramid python quarry
    quartz quilt quiver rabbit raccoon radar radish rainbow raisin ranch raven razor reef rhubarb ribbon riddle
    river robin rocket rooster ruby rudder saddle sailor salad salmon sapling sapphire satchel saucer savanna
    saxophone scarf scepter school scooter scout sculptor seagull senator shadow shamrock sheriff shovel shrimp
    shuttle signal skeleton sketch sleigh slipper snail soldier sparrow spatula spider spinach spindle squirrel
    statue sturgeon submarine suburb sugar summit surgeon swallow swamp syrup tailor tambourine tapestry teacher
    teapot telescope temple theater thimble thistle thunder tiger timber toaster tomato topaz torch tortoise
    tower tractor trellis trombone trophy trumpet tulip tundra tunnel turbine turkey turnip turtle tuxedo
    umbrella uncle unicorn urchin valley vampire vanilla vault vessel vicar village vineyard violin viper
    volcano voyage vulture waffle wagon waiter wallet walnut walrus warden warrior wasabi weasel wharf whisker
    widow willow window winter wizard wolf wombat workshop wreath yacht yogurt zebra zenith zeppelin zipper
    """.split()
)
VERBS = tuple(
    """
    abandon absorb accept accuse achieve admire adopt adore advise amuse announce answer appear applaud argue
    arrange arrive assist assume attend avoid awake bargain behave believe belong borrow bounce breathe bring
    bruise bury calculate carve catch cheat choose chuckle climb collect combine commute complain compose
    confess confuse connect consider consume continue convince cough count crawl create crumble debate decide
    declare decorate defend deliver deny depart depend describe deserve destroy detect develop devour dictate
    digest disagree discover dissolve distract dive divide donate doubt drift drink educate embrace emerge
    emigrate employ enchant endure enjoy enlarge escape evade examine exceed exchange excuse exist expand
    explain explore fasten fetch flatter flinch flourish follow forbid forgive furnish gallop gamble gather
    giggle glance gobble govern grumble guard guess gurgle handle happen harass hesitate hover identify ignore
    imagine imitate improve include inform inhale inherit inquire insist inspire interrupt invade invent invite
    juggle kneel knock laugh launch lecture listen locate loiter lurk manage marry measure mention mingle mumble
    narrate navigate neglect negotiate nibble nominate notice nourish obey object observe obtain occupy operate
    oppose overcome participate perform persuade ponder postpone pounce praise pray predict prepare preserve
    pretend prevent proceed produce promise pronounce protect provide publish punish purchase pursue quarrel
    question react realize rebuild recall receive recite recognize recover reduce refuse regret rehearse reject
    rejoice release rely remain remember remind remove repair repeat replace request rescue resemble resist
    resolve respond retire retreat return reveal revolve sacrifice scatter scold scrub search seize select
    separate shiver shout shrug sigh simmer sneeze snore soothe sprint squeeze stammer startle stumble subtract
    succeed suffer suggest supply support suppose surrender survive suspect swim tackle tease tempt testify
    threaten tickle tolerate translate travel tremble understand unfold unite vanish venture visit vote wander
    warn welcome whistle wiggle wither wonder worry wrestle yawn yield
    """.split()
)
